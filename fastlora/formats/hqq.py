"""HQQ's layer, ``HQQLinear``."""

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.other_packages import is_class
from .format import Quantized, name_of
from .opaque import Opaque
from .vendor import PackedLayer, checked

_MODULE = "hqq.core.quantize"


class HQQ(Opaque):
    """W_q, scale and zero of an ``HQQLinear`` whose groups lie in rows."""

    names: ClassVar[tuple[str, ...]] = ("W_q", "scale", "zero")

    def values(self, *tensors: Tensor) -> Tensor:
        packed, scale, zero = tensors
        quantizer = sys.modules[_MODULE].Quantizer
        settings = {
            "nbits": self.bits, "packing": quantizer.bit_to_packing[self.bits], "axis": 1,
            "group_size": self.group, "shape": (self.rows, self.columns),
            "compute_dtype": self.dtype, "view_as_float": False, "scale": scale, "zero": zero,
        }  # fmt: skip
        return quantizer.dequantize(packed, settings)


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "HQQLinear")


@checked("its quantization state is")
def read(layer: Any) -> PackedLayer | str:
    if not layer.ready:
        return "its weight isn't quantized as yet"
    meta, packed = layer.meta, layer.W_q.detach()
    if meta["axis"] != 1:
        return f"its groups run down the columns (axis={meta['axis']}): only those in rows are read"
    if not meta["packing"]:
        return "its numbers aren't packed"
    if meta.get("quant_zero") or meta.get("quant_scale") or "zero_scale" in meta:
        return "its scales or zero points are also packed"
    if meta["view_as_float"]:
        packed = packed.view(meta["unpack_view_dtype"])
    rows, columns = meta["shape"]
    compute = name_of(meta["scale"].dtype)
    format = HQQ(rows, columns, meta["nbits"], meta["group_size"] or columns, compute)
    tensors = tuple(map(_keepable, (packed, meta["scale"], meta["zero"])))
    return PackedLayer(Quantized(format, tensors))


def _keepable(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd can save; HQQ makes its own in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        blank = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        place = tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        return blank.set_(*place)
