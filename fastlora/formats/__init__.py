"""Packed weights: what a format's tensors mean, what kernels read of them, and vendors' layers.

A file has a format, as :mod:`.format` asks for it, and below it the layers of its vendor, as
:mod:`.vendor` does; naming it in ``VENDORS`` is all that your own models need, and PEFT's, but for
its classes of such layers (peft/layer.py).  A vendor's package is looked at, never imported.
"""

from torch import nn

from . import bitsandbytes, float8, gguf, gptq, hqq, torchao
from .vendor import SHARDED, PackedLayer, Vendor

__all__ = ["SHARDED", "VENDORS", "PackedLayer", "Vendor", "quantized_weight", "vendor_of"]

# The type checker holds every vendor to the contract.
VENDORS: tuple[Vendor, ...] = (bitsandbytes, torchao, float8, gguf, hqq, gptq)


def vendor_of(layer: nn.Module, kind: type[nn.Module] | None = None) -> Vendor | None:
    """Whose quantized linear layer this is; None: nobody's.  ``kind``: in its class's place."""
    kind = type(layer) if kind is None else kind
    return next((vendor for vendor in VENDORS if vendor.owns(layer, kind)), None)


def quantized_weight(
    layer: nn.Module, kind: type[nn.Module] | None = None
) -> PackedLayer | str | None:
    """A vendor's layer as a packed weight, or why it can't be read; None: it is no vendor's.

    ``kind``: in its class's place.
    """
    vendor = vendor_of(layer, kind)
    return None if vendor is None else vendor.read(layer)
