"""The frozen layers beside the adapted ones: which become fast by another class, and back.

Only where this device gains: 16-bit weights on a CPU that multiplies 16 bits slowly.  Elsewhere
nothing changes.
"""

from collections.abc import Iterable

from torch import nn

from ..backends.products import are_wide
from . import frozen
from .base import why_not_tensor
from .classes import change_class
from .modules import plain_name


def take(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer fast that gains by it, and return those that weren't before."""
    layers = [layer for layer in layers if _gains(layer)]
    for layer in layers:
        change_class(layer, nn.Linear, frozen.Linear)
    return layers


def give_back(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer torch's again, and return those that were fast."""
    layers = [layer for layer in layers if isinstance(layer, frozen.Linear)]
    for layer in layers:
        change_class(layer, frozen.Linear, nn.Linear)
    return layers


def taken(model: nn.Module) -> list[str]:
    """The names of the layers whose calls are fast now."""
    return [
        plain_name(name)
        for name, layer in model.named_modules()
        if isinstance(layer, frozen.Linear) and frozen.slow_weight(layer) is not None
    ]


def _gains(layer: nn.Module) -> bool:
    """Whether it is a plain frozen layer, and this device multiplies its weight slowly."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight, bias = frozen.slow_weight(layer), layer.bias
    if weight is None or why_not_tensor(weight, 2):
        return False
    if bias is not None and (why_not_tensor(bias, 1) or bias.dtype != weight.dtype):
        return False
    return weight.numel() > 0 and not weight.is_inference() and are_wide(weight)
