"""Kinds of calls that passed the checks: a call of a known kind needs no second look.

A kind is everything that the checks, the choice of backend and the launches of a forward look at.
So whoever adds a check adds what it looks at to :func:`key_of`.  A module's calls needn't come
here: what was read of it is kept with its calls (:mod:`fastlora.layers.reading`).
"""

from collections.abc import Hashable, Sequence
from threading import Lock
from typing import Any

from torch import Tensor

from ..backends import Call, asked_backend
from ..formats.format import Quantised
from ..projection import Output, Projection, is_plain
from .autocast import autocast_dtype
from .way import NODE, way_of

_MOST = 1024
_changes = Lock()  # to find the oldest, no other thread may change them
_known: dict[Hashable, Call] = {}


def may_be_known(x: Tensor) -> bool:
    """Whether a call made at this moment, with this x, can be of a known kind."""
    return is_plain(x) and way_of(x)[0] == NODE


def facts_of(tensor: Tensor) -> Hashable:
    """What the checks and the launchers ask of a tensor: all but its numbers.

    From aligned addresses, 16 bytes are loaded at once.  Raises for what has no strides.
    """
    if tensor.is_nested:
        raise ValueError("a nested tensor isn't of a known kind")
    where = tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() & 15
    return where, type(tensor), tensor.requires_grad, tensor.is_neg(), tensor.is_inference()


def key_of(
    x: Tensor,
    projections: Sequence[Projection | Output],
    dropout: float,
    training: bool,
    backend: str | None,
) -> tuple[Hashable, list[Tensor]]:
    """The key of an eager call, and its tensors laid flat, x first; None: it has to be checked.

    Two calls with the same key are right or wrong both.
    """
    if type(projections) not in (list, tuple):
        return None, []
    inputs, switch = [x], training is True or training is False
    rest: list[Any] = [asked_backend(backend), dropout, type(dropout), switch, training]
    try:
        for projection in projections:
            rest.append(type(projection))
            if isinstance(projection, Projection):
                weight, lora_a, lora_b, bias, scale = projection
                rest += weight is None, bias is None, scale, type(scale)
                if isinstance(weight, Quantised):
                    rest.append(weight.format)
                    inputs += weight.tensors
                    weight = None
                inputs += [each for each in (weight, bias) if each is not None]
                inputs += lora_a, lora_b
            else:
                base, adapters = projection
                weight, bias = base
                rest += type(base), type(adapters), len(adapters), bias is None
                if isinstance(weight, Quantised):
                    rest.append(weight.format)
                    inputs += weight.tensors if bias is None else (*weight.tensors, bias)
                else:
                    inputs += (weight,) if bias is None else (weight, bias)
                for lora_a, lora_b, scale in adapters:
                    rest += scale, type(scale)
                    inputs += lora_a, lora_b
        key = autocast_dtype(x), *rest, *map(facts_of, inputs)
        hash(key)
        return key, inputs
    except Exception:  # whatever it is, the checks say it better
        return None, []


def known(key: Hashable) -> Call | None:
    """The record of a call with this key, if one has passed the checks."""
    return _known.get(key)


def remember(key: Hashable, call: Call) -> None:
    """The record of a call that passed the checks; the oldest kinds are forgotten."""
    with _changes:
        while len(_known) >= _MOST and key not in _known:
            del _known[next(iter(_known))]
        _known[key] = call
