"""Kinds of calls that passed the checks: a call of a known kind needs no second look.

A kind is everything that the checks, the choice of backend and the launches of a forward look at.
What the tensors are is compared by the guard that torch.compile makes of them: their classes,
dtypes, devices, shapes, strides and dispatch keys (layout, a minus that isn't in memory, inference
mode), and whether autograd follows them.  It takes a tenth of what asking for each from Python
does.  The rest is the key of the kind, autocast's dtype too.  The tensors are those that autocast
hasn't cast yet.
"""

from collections.abc import Hashable, Sequence
from operator import attrgetter
from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor

from ..backends import Call, asked_backend
from ..formats.format import Quantised
from ..projection import Output, Projection, is_plain
from .autocast import autocast_dtype
from .way import NODE, way_of

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it isn't public; without it no call is known
    TensorGuards = None  # type: ignore[assignment, misc]

_MOST, _MOST_OF_A_KEY, _MOST_ALIGNMENTS = 1024, 16, 256
_is_nested = attrgetter("is_nested")
_changes = Lock()  # to find the oldest, no other thread may change them


class _Kind(NamedTuple):
    guard: Any  # TensorGuards
    call: Call
    aligned: dict[bytes, Call]  # by the addresses modulo 16, which decide what may be kept

    def call_for(self, inputs: Sequence[Tensor]) -> Call:
        """The checks don't look at addresses: others than before are no other kind."""
        if self.call.is_few:
            return self.call
        addresses = _alignment(inputs)
        found = self.aligned.get(addresses)
        if found is None:
            if len(self.aligned) >= _MOST_ALIGNMENTS:
                self.aligned.clear()
            found = self.aligned[addresses] = self.call._replace(kept={})
        return found


_known: dict[Hashable, tuple[_Kind, ...]] = {}


def may_be_known(x: Tensor) -> bool:
    """Whether a call made at this moment, with this x, can be of a known kind."""
    return TensorGuards is not None and is_plain(x) and way_of(x)[0] == NODE


def key_of(
    x: Tensor,
    projections: Sequence[Projection | Output],
    dropout: float,
    training: bool,
    backend: str | None,
) -> tuple[Hashable, list[Tensor]]:
    """The key of an eager call, and its tensors laid flat, x first; None: it has to be checked.

    Two calls with the same key and tensors of the same kind are right or wrong both.
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
                rest += weight is None, bias is None, scale, type(scale), lora_b.shape
                if isinstance(weight, Quantised):
                    rest.append(weight.format)
                    inputs += weight.tensors
                    weight = None
                inputs += [each for each in (weight, bias) if each is not None]
                inputs += lora_a, lora_b
            else:
                base, adapters = projection
                weight, bias = base
                rest += type(base), type(adapters), len(adapters), bias is None, weight.shape
                if isinstance(weight, Quantised):
                    rest.append(weight.format)
                    inputs += weight.tensors if bias is None else (*weight.tensors, bias)
                else:
                    inputs += (weight,) if bias is None else (weight, bias)
                for lora_a, lora_b, scale in adapters:
                    rest += scale, type(scale), lora_b.shape
                    inputs += lora_a, lora_b
        return (x.shape, autocast_dtype(x), *rest), inputs
    except Exception:  # whatever it is, the checks say it better
        return None, []


def known(key: Hashable, inputs: Sequence[Tensor]) -> Call | None:
    """The record of a call with this key and these tensors, if one has passed the checks."""
    try:
        kinds = _known.get(key)
        if kinds is None or any(map(_is_nested, inputs)):  # these end the process in a guard
            return None
    except Exception:  # what isn't hashable, or no tensor: the checks say it better
        return None
    for kind in kinds:
        if kind.guard.check(*inputs):
            return kind.call_for(inputs)
    return None


def remember(key: Hashable, inputs: Sequence[Tensor], call: Call) -> None:
    """The record of a call that passed the checks; the oldest kinds are forgotten."""
    dims: Any = {  # torch's own annotations of this class know less than it takes
        "dynamic_dims_sizes": [[*tensor.shape] for tensor in inputs],
        "dynamic_dims_strides": [[*tensor.stride()] for tensor in inputs],
    }
    guard = TensorGuards(*inputs, **dims)
    kind = _Kind(guard, call, {_alignment(inputs): call})
    with _changes:
        while len(_known) >= _MOST and key not in _known:
            del _known[next(iter(_known))]
        _known[key] = (kind, *_known.get(key, ())[: _MOST_OF_A_KEY - 1])


def _alignment(inputs: Sequence[Tensor]) -> bytes:
    return bytes([tensor.data_ptr() & 15 for tensor in inputs])
