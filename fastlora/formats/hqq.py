"""HQQ: groups of a row share a scale and a zero; one byte holds codes of distant groups.

Also its layer, ``HQQLinear``.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import is_class
from .arithmetic import place_for
from .format import Expected, Format, Quantized, name_of
from .vendor import PackedLayer, checked

# HQQ's Quantizer.dequantize makes the whole weight.  With it a float32 step with 512 rows and a
# 2048² weight of 4 bits takes 1.45 × the time and 2.8 × the peak memory, a bfloat16 step 1.11 × and
# 1.9 × (process time, one thread, hqq 0.2.8).

_COUNTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # by bits of a code: how many codes an element packs


@dataclass(frozen=True)
class Hqq(Format):
    """weight = (code - zero) · scale in the dtype ``compute``, for groups of ``group`` columns.

    W_q [⌈groups / count⌉, group] packs ``count`` codes in an element, int32 for 3 bits and uint8
    otherwise.  Row i holds, from the highest bits on, the codes of group i, of group i + len(W_q),
    of group i + 2 len(W_q), …  scale and zero are [groups, 1].
    """

    bits: int
    group: int
    compute: str

    @property
    def label(self) -> str:
        return f"HQQ {self.bits} bit"

    def expected(self) -> Expected:
        if self.bits not in _COUNTS:
            raise ValueError(f"{self.bits} bits came, but HQQ has 1, 2, 3, 4 or 8")
        if self.group < 1 or self.columns % self.group:
            raise ValueError(f"groups of {self.group} don't divide rows of {self.columns}")
        count, groups = _COUNTS[self.bits], self.rows * self.columns // self.group
        each = ((groups, 1), (self.dtype,))
        word = torch.int32 if self.bits == 3 else torch.uint8
        packed = ((-(-groups // count), self.group), (word,))
        return {"W_q": packed, "scale": each, "zero": each}

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        packed, scale, zero = tensors
        per_row = self.columns // self.group
        groups = slice(first * per_row, (first + len(out)) * per_row)
        values = place_for(out, self.dtype, dense=True)
        of_groups = values.view(-1, self.group)
        self._unpack(packed, groups, of_groups)
        of_groups.sub_(zero[groups]).mul_(scale[groups])
        return out if values is out else out.copy_(values)

    def _unpack(self, packed: Tensor, groups: slice, out: Tensor) -> None:
        """Write the codes of these groups, which may lie in several bit fields of W_q."""
        count, total = _COUNTS[self.bits], len(packed)
        # Field f of all rows of W_q holds the groups from f · total on.
        for field in range(groups.start // total, (groups.stop - 1) // total + 1):
            start = field * total
            begin, end = max(groups.start, start), min(groups.stop, start + total)
            some = packed[begin - start : end - start] >> self.bits * (count - 1 - field)
            out[begin - groups.start : end - groups.start] = some & (2**self.bits - 1)


# The library's layer.

_MODULE = "hqq.core.quantize"

PARTS: tuple[str, ...] = ("W_q", "meta")


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "HQQLinear")


@checked("its quantization state is")
def read(layer: Any) -> PackedLayer | str:
    if not layer.ready:
        return "its weight isn't quantized as yet"
    meta, packed = layer.meta, layer.W_q.detach()
    if meta["axis"] != 1:
        return f"its groups run down the columns (axis={meta['axis']}): only those in rows are read"
    if not meta["packing"] or meta["nbits"] not in _COUNTS:
        return f"its numbers aren't packed, or have {meta['nbits']} bits"
    if meta.get("quant_zero") or meta.get("quant_scale") or "zero_scale" in meta:
        return "its scales or zero points are also packed"
    if meta["view_as_float"]:
        packed = packed.view(meta["unpack_view_dtype"])
    rows, columns = meta["shape"]
    compute = name_of(meta["scale"].dtype)
    format = Hqq(rows, columns, meta["nbits"], meta["group_size"] or columns, compute)
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


def pack(layer: Any, weight: Tensor) -> None:
    settings = layer.quant_config["weight_quant_params"]
    place = {"device": layer.device, "compute_dtype": layer.compute_dtype}
    packed, meta = sys.modules[_MODULE].Quantizer.quantize(weight, **place, **settings)
    names = ("quant_scale", "quant_zero", "compute_dtype")
    meta |= {name: layer.meta[name] for name in names if name in layer.meta}
    for name in ("scale", "zero"):  # HQQ computes in the dtype of the layer's scale
        meta[name] = meta[name].to(layer.meta[name].dtype)
    layer.W_q, layer.meta = nn.Parameter(packed, requires_grad=False), meta
