"""A PEFT layer becomes a fast one, and PEFT's again, by its class."""

from collections.abc import Iterable
from functools import cache
from types import MethodType
from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .layer import Linear

# What users know PEFT's layers by, where it isn't the class's name.
_WORDS = {"ParamWrapper": "expert parameters (target_parameters)"}
_FORWARDS = ("forward", "_old_forward")  # on an instance; the second is accelerate's


def is_swapped(layer: nn.Module) -> bool:
    return isinstance(layer, Linear)


def why_not_swapped(layer: nn.Module) -> str:
    """Why this layer can't become fast, or isn't called when it has; "" if it can."""
    if not any(_is_over(type(layer), base) for base in (PeftLinear, Linear)):
        kind = type(layer).__name__
        return f"only PEFT's lora.Linear is sped up, not {_WORDS.get(kind, kind)}"
    own = layer.__dict__.get("forward")
    if own is None or _is_ours(own):
        return ""
    if "_hf_hook" in layer.__dict__ and _is_ours(layer.__dict__.get("_old_forward")):
        return ""
    return "its forward was replaced on the instance"


def swap_all(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer fast that can be, and return those that weren't before."""
    layers = [layer for layer in layers if not is_swapped(layer) and not why_not_swapped(layer)]
    for layer in layers:
        _change(layer, PeftLinear, Linear)
    return layers


def unswap_all(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer PEFT's again, and return those that were fast."""
    layers = [layer for layer in layers if is_swapped(layer)]
    for layer in layers:
        _change(layer, Linear, PeftLinear)
    return layers


def _change(layer: nn.Module, old: Any, new: Any) -> None:
    cls: Any = type(layer)
    layer.__class__ = new if cls is old else _over(cls, new)
    for name in _FORWARDS:
        if getattr(layer.__dict__.get(name), "__func__", None) is old.forward:
            layer.__dict__[name] = MethodType(new.forward, layer)


def _is_over(cls: type, base: type) -> bool:
    """Whether ``cls`` is ``base``, or what FSDP2 makes of that."""
    if cls is base:
        return True
    *kinds, last = cls.__bases__
    return last is base and len(kinds) == 1 and issubclass(kinds[0], FSDPModule)


@cache
def _over(cls: type, base: type) -> type:
    """``cls``, which FSDP2 or a parametrization derived from such a class, over ``base``."""
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    bases = tuple(base if b in (PeftLinear, Linear) else b for b in cls.__bases__)
    return type(cls.__name__, bases, members)


def _is_ours(forward: object) -> bool:
    return getattr(forward, "__func__", None) in (PeftLinear.forward, Linear.forward)
