"""The cache of calls: two levels, and one function for their keys.

Checks, dispatch, the choice of backend and the launches of a call depend on its kind: x's and all
tensors' facts (:func:`fastlora.projection.facts_of`), the numbers beside them, autocast, and the
backend that is asked for.  :func:`key_of` makes the key of a kind, and a later call with an equal
key skips all of that.

1. A module keeps a guarded record (:mod:`fastlora.layers.guards`), with its calls by the key of x.
   The guard compares everything else, so an entry is valid while the guard holds.
2. This file keeps calls by the key of all their tensors.  An entry is a :class:`Call`, or a record
   that holds some, and ``captured`` of that has the launches of its forward.  It depends on nothing
   outside of its key, so it is valid for ever; the oldest entries go first.  Captured launches also
   depend on plans and on verification, which kernels/replay.py compares before each replay.  That
   file holds the launches of all other calls (backwards, experts, many adapters), by the same facts.

A new check of a call must add what it looks at to :func:`key_of` or ``facts_of``.
"""

from collections.abc import Hashable, Sequence
from threading import Lock
from typing import Any

from torch import Tensor

from ..backends import asked_backend
from ..formats.format import Quantized
from ..projection import Output, Projection, facts_of
from .dispatch import autocast_dtype, is_ordinary

_MOST = 1024
_changes = Lock()  # no other thread may change a cache while the oldest entry is looked up
_calls: dict[Hashable, Any] = {}


def key_of(
    inputs: Sequence[Tensor], rest: Sequence[Hashable] = (), backend: str | None = None
) -> Hashable:
    """The key of an eager call made at this moment with these tensors, x first.

    Calls with equal keys are equally valid, so the checks can be skipped.  Raises for a tensor
    without strides or address.
    """
    return autocast_dtype(inputs[0]), asked_backend(backend), *rest, *map(facts_of, inputs)


def key_of_x(x: Tensor) -> Hashable:
    """The key of a module's call, whose guard covers the other tensors; None: it isn't cached."""
    try:
        return key_of([x]) if is_ordinary(x) else None
    except Exception:  # x is sparse, or has outlived a transform of torch.func
        return None


def key_of_outputs(
    x: Tensor,
    projections: Sequence[Projection | Output],
    dropout: Hashable,
    training: bool = True,
    backend: str | None = None,
) -> tuple[Hashable, list[Tensor]]:
    """The key of an eager call of outputs, None if it isn't cached, and its tensors laid flat.

    ``dropout``: for a call that is more than linear layers, a tuple of everything else that it
    depends on.
    """
    if not is_ordinary(x) or type(projections) not in (list, tuple):
        return None, []
    inputs: list[Any] = [x]
    rest: list[Any] = [dropout, type(dropout), training is True or training is False, training]
    try:
        for projection in projections:
            rest.append(type(projection))
            if isinstance(projection, Projection):
                weight, lora_a, lora_b, bias, scale = projection
                rest += weight is None, bias is None, scale, type(scale)
                if isinstance(weight, Quantized):
                    rest.append(weight.format)
                    inputs += weight.tensors
                    weight = None
                inputs += [each for each in (weight, bias) if each is not None]
                inputs += lora_a, lora_b
            else:
                base, adapters = projection
                weight, bias = base
                rest += type(base), type(adapters), len(adapters), bias is None
                if isinstance(weight, Quantized):
                    rest.append(weight.format)
                    inputs += weight.tensors if bias is None else (*weight.tensors, bias)
                else:
                    inputs += (weight,) if bias is None else (weight, bias)
                for lora_a, lora_b, scale in adapters:
                    rest += scale, type(scale)
                    inputs += lora_a, lora_b
        key = key_of(inputs, rest, backend)
        hash(key)
        return key, inputs
    except Exception:  # no such records, or no such numbers: the checks say it better
        return None, []


def call_of(key: Hashable) -> Any:
    """The cached call of this key; None: there is none."""
    return None if key is None else _calls.get(key)


def remember(
    calls: dict[Hashable, Any] | None, key: Hashable, call: Any, most: int | None = None
) -> None:
    """Cache a call that passed the checks, in this cache or the one of all calls."""
    calls = _calls if calls is None else calls
    with _changes:
        while len(calls) >= (most or _MOST) and key not in calls:
            del calls[next(iter(calls))]
        calls[key] = call
