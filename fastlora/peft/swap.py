"""A PEFT layer becomes a fast one, and PEFT's again, by its class."""

from collections.abc import Iterable

from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from ..classes import change_class, is_over
from .layer import Linear

# What users know PEFT's layers by, where it isn't the class's name.
_WORDS = {"ParamWrapper": "expert parameters (target_parameters)"}


def is_swapped(layer: nn.Module) -> bool:
    return isinstance(layer, Linear)


def why_not_swapped(layer: nn.Module) -> str:
    """Why this layer can't become fast, or isn't called when it has; "" if it can."""
    if not any(is_over(type(layer), base) for base in (PeftLinear, Linear)):
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
        change_class(layer, PeftLinear, Linear)
    return layers


def unswap_all(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer PEFT's again, and return those that were fast."""
    layers = [layer for layer in layers if is_swapped(layer)]
    for layer in layers:
        change_class(layer, Linear, PeftLinear)
    return layers


def _is_ours(forward: object) -> bool:
    return getattr(forward, "__func__", None) in (PeftLinear.forward, Linear.forward)
