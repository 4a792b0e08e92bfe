"""HQQ's ``HQQLinear``."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import is_class
from ..formats.format import Quantised, name_of
from ..formats.hqq import Hqq
from .vendor import PackedLayer

_MODULE = "hqq.core.quantize"

PARTS: tuple[str, ...] = ("W_q", "meta")


def owns(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "HQQLinear")


def read(layer: nn.Module) -> PackedLayer | str:
    theirs: Any = layer
    if not theirs.ready:
        return "its weight isn't quantised as yet"
    meta = theirs.meta
    if meta["axis"] != 1:
        return f"its groups run down the columns (axis={meta['axis']}): only those in rows are read"
    if not meta["packing"] or meta["nbits"] not in (1, 2, 3, 4, 8):
        return f"its numbers aren't packed, or have {meta['nbits']} bits"
    if meta.get("quant_zero") or meta.get("quant_scale") or "zero_scale" in meta:
        return "its scales or zero points are packed, too"
    try:
        packed = theirs.W_q.detach()
        if meta["view_as_float"]:
            packed = packed.view(meta["unpack_view_dtype"])
        rows, columns = meta["shape"]
        compute = name_of(meta["scale"].dtype)
        format = Hqq(rows, columns, meta["nbits"], meta["group_size"] or columns, compute)
        tensors = tuple(map(_keepable, (packed, meta["scale"], meta["zero"])))
        format.check(tensors)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"its quantisation state is broken: {error}"
    return PackedLayer(Quantised(format, tensors))


def _keepable(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that a backward can keep: HQQ makes its own in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        blank = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        place = tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        return blank.set_(*place)


def pack(layer: nn.Module, weight: Tensor) -> None:
    theirs: Any = layer
    settings = theirs.quant_config["weight_quant_params"]
    place = {"device": theirs.device, "compute_dtype": theirs.compute_dtype}
    packed, meta = sys.modules[_MODULE].Quantizer.quantize(weight, **place, **settings)
    names = ("quant_scale", "quant_zero", "compute_dtype")
    meta |= {name: theirs.meta[name] for name in names if name in theirs.meta}
    for name in ("scale", "zero"):  # in the layer's dtype, in which HQQ computes
        meta[name] = meta[name].to(theirs.meta[name].dtype)
    theirs.W_q, theirs.meta = nn.Parameter(packed, requires_grad=False), meta
