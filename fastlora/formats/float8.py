"""float8: codes are floating-point numbers of 8 bits, and each block has a scale.

Also transformers' ``FP8Linear`` and ``FP8Experts`` (DeepSeek's checkpoints, for example), with a
scale for each block, each row or the whole weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.other_packages import is_class
from .arithmetic import place_for, scales_of, widen
from .format import Coding, Expected, Format, Quantized, name_of, of_rows
from .microscaled import MXFP4
from .vendor import PackedLayer, checked

CODES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Float8(Format):
    """weight = code · scale of its block, computed in float32 and rounded once to out's dtype.

    weight [rows, columns] of the dtype ``code``, scale [⌈rows / block_rows⌉, ⌈columns /
    block_columns⌉].  torchao dequantizes a Float8Tensor in the same way, and transformers a
    checkpoint.
    """

    code: str
    block_rows: int
    block_columns: int

    label: ClassVar[str] = "float8"

    def expected(self) -> Expected:
        if self.code not in CODES:
            raise ValueError(f"codes of {self.code} came, but must be of {', '.join(CODES)}")
        if min(self.block_rows, self.block_columns) < 1:
            raise ValueError(f"blocks of {self.block_rows} × {self.block_columns} came: too small")
        blocks = -(-self.rows // self.block_rows), -(-self.columns // self.block_columns)
        code: torch.dtype = getattr(torch, self.code)
        return {"weight": ((self.rows, self.columns), (code,)), "scale": (blocks, _SCALES)}

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        codes, scale = tensors
        codes = codes[first : first + len(out)]
        wide = place_for(out, torch.float32)
        factor = widen(codes, wide)
        scale = of_rows(scale, first, len(out), self.block_rows)
        _multiply(wide, scales_of(wide, scale.float(), factor), self.block_columns)
        return out if wide is out else out.copy_(wide)

    @property
    def coding(self) -> Coding | None:
        height = 0 if self.block_rows >= self.rows else self.block_rows
        width = 0 if self.block_columns >= self.columns else self.block_columns
        return Coding("float8", height, width) if self.code == "float8_e4m3fn" else None

    def coded(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        codes, scale = tensors
        # Kernels can't read float8_e8m0fnu; converting the few scales costs little.
        wide = scale.float() if scale.dtype == torch.float8_e8m0fnu else scale
        return codes.view(torch.uint8), wide


def _multiply(values: Tensor, scale: Tensor, width: int) -> None:
    """Multiply each ``width`` columns by their scale; the last block may be narrower."""
    whole = values.shape[1] // width
    if whole:
        values[:, : whole * width].unflatten(1, (whole, width)).mul_(scale[:, :whole, None])
    if whole < scale.shape[1]:
        values[:, whole * width :].mul_(scale[:, whole:])


# transformers' float8 layers.

_MODULE = "transformers.integrations.finegrained_fp8"

SCALE = "_scale_inv"  # the suffix of a scale's name after the weight's


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "FP8Linear")


@checked("its float8 weight is")
def read(layer: Any) -> PackedLayer | str:
    codes, scale = layer.weight.detach(), layer.weight_scale_inv.detach()
    if codes.element_size() > 1:
        return f"its weight is dense {codes.dtype}, in a class for float8"
    if codes.dtype == torch.int8:
        return "its weight has 4 bits (float4), which no format reads"
    (n, k), (rows, columns) = codes.shape, _block(layer)
    blocks = -(-n // rows), -(-k // columns)
    if scale.numel() == blocks[0] * blocks[1]:
        scale = scale.view(blocks)
    format = Float8(n, k, name_of(codes.dtype), rows, columns)
    return PackedLayer(Quantized(format, (codes, scale)), rounds_input=True)


@checked("its {1} is")
def experts_weight(experts: Any, name: str) -> Quantized:
    """A weight of ``FP8Experts`` as a stack [E, N, K] without a copy, or why it can't be read.

    With ``block_size`` each block has a scale.  Without it an expert has one scale, one for each
    half of its rows (gate and up), or one for each row.
    """
    codes, scale = getattr(experts, name).detach(), getattr(experts, f"{name}{SCALE}").detach()
    _, n, k = codes.shape
    if codes.dtype == torch.int8:
        return Quantized(MXFP4(n, 2 * k), (codes, scale))
    count = scale.shape[1]
    rows, columns = experts.block_size or (n // count if count in (1, 2, n) else 0, k)
    return Quantized(Float8(n, k, name_of(codes.dtype), rows, columns), (codes, scale))


def _block(layer: Any) -> tuple[int, int]:
    """The rows and columns that share a scale."""
    rows, columns = layer.weight.shape
    scale = layer.weight_scale_inv
    if scale.numel() == 1:
        return rows, columns
    if layer.block_size is None or scale.shape in ((rows,), (rows, 1)):
        return 1, columns
    block_rows, block_columns = layer.block_size
    return int(block_rows), int(block_columns)
