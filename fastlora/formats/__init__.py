"""Packed weights: formats, the tensors that kernels read, and vendors' layers.

Each vendor's file defines a format (a subclass of :class:`.format.Format`) and below it the
functions of :class:`.vendor.Vendor`, which read the vendor's layers.  To add a vendor, name its
file in ``VENDORS``; peft/layer.py lists PEFT's classes for such layers.  A vendor's file never
imports the vendor's package: a model with such a layer has imported it.
"""

from torch import nn

from . import bitsandbytes, float8, gguf, gptqmodel, hqq, rotated_int8, stored, torchao
from .vendor import SHARDED, PackedLayer, Vendor

__all__ = ["SHARDED", "VENDORS", "PackedLayer", "Vendor", "quantized_weight", "vendor_of"]

# mypy checks every vendor against the protocol.
VENDORS: tuple[Vendor, ...] = (
    bitsandbytes, torchao, float8, gguf, hqq, gptqmodel, rotated_int8, stored
)  # fmt: skip


def vendor_of(layer: nn.Module, kind: type[nn.Module] | None = None) -> Vendor | None:
    """The vendor of this quantized linear layer, or None.  ``kind`` replaces the layer's class."""
    kind = type(layer) if kind is None else kind
    return next((vendor for vendor in VENDORS if vendor.owns(layer, kind)), None)


def quantized_weight(
    layer: nn.Module, kind: type[nn.Module] | None = None
) -> PackedLayer | str | None:
    """A vendor's layer as a packed weight, or why it can't be read; None: it has no vendor.

    ``kind`` replaces the layer's class.
    """
    vendor = vendor_of(layer, kind)
    return None if vendor is None else vendor.read(layer)


def weight_of(layer: nn.Module) -> PackedLayer | str | None:
    """The same for reading the weight alone: also of layers whose calls round or can't be fast."""
    vendor = vendor_of(layer)
    return None if vendor is None else getattr(vendor, "read_weight", vendor.read)(layer)
