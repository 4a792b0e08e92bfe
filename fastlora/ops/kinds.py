"""Kinds of calls that passed the checks: a call of a known kind needs no second look.

A kind is everything that the checks, the choice of backend and the launches of a forward look at.
"""

from collections.abc import Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor

from ..backends import Settings, backend_name
from ..projection import Output, Projection
from .autocast import autocast_is_on
from .textbook import needs_textbook

_MOST = 1024
_known: dict[Hashable, Settings] = {}
_changes = Lock()  # to find the oldest, no other thread may change them


def kind_of(
    x: Tensor,
    projections: Sequence[Projection | Output],
    dropout: float,
    training: bool,
    backend: str | None,
) -> tuple[Hashable, list[Tensor]]:
    """The kind of an eager call, and its tensors laid flat, x first; None: it has to be checked.

    Two calls with the same kind are right or wrong both.
    """
    if torch._C._len_torch_dispatch_stack() or type(projections) not in (list, tuple):
        return None, []
    inputs, rest = [x], [dropout, type(dropout), training is True or training is False, training]
    try:
        if autocast_is_on(x.device.type) or needs_textbook(x):
            return None, []
        for projection in projections:
            if isinstance(projection, Projection):
                rest.append(type(projection))
                weight, lora_a, lora_b, bias, scale = projection
                rest += weight is None, bias is None, scale, type(scale)
                inputs += [each for each in (weight, bias, lora_a, lora_b) if each is not None]
            else:
                base, adapters = projection
                weight, bias = base
                rest += type(projection), type(base), type(adapters), len(adapters), bias is None
                inputs += (weight,) if bias is None else (weight, bias)
                for lora_a, lora_b, scale in adapters:
                    rest += scale, type(scale)
                    inputs += lora_a, lora_b
        name = backend_name(backend, x.device)
        return (name, *rest, *map(_facts, inputs)), inputs
    except Exception:  # whatever it is, the checks say it better
        return None, []


def known(kind: Hashable) -> Settings | None:
    """The settings of a call of this kind, if one has passed the checks."""
    try:
        return _known.get(kind)
    except TypeError:  # there is something in it that isn't hashable
        return None


def remember(kind: Hashable, settings: Settings) -> None:
    """The settings of a call of this kind that passed the checks; the oldest is forgotten."""
    with _changes:
        while len(_known) >= _MOST:
            del _known[next(iter(_known))]
        _known[kind] = settings


def _facts(tensor: Tensor) -> Hashable:
    """Of a plain dense tensor; anything else raises, or has a kind that is never known."""
    shape, strides, address = tensor.shape, tensor.stride(), tensor.data_ptr() & 15
    return type(tensor), shape, strides, tensor.dtype, tensor.device, address, tensor.is_neg()
