"""Numbers of 8 bits with a floating point, and a scale for each block of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .format import Format, check_shapes, of_rows, place_for

CODES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Float8(Format):
    """weight = code · scale of its block, the product float32's, rounded once to another dtype.

    Codes [rows, columns] of the dtype ``code``, scale [⌈rows / block_rows⌉, ⌈columns /
    block_columns⌉].  So torchao dequantises a Float8Tensor, and transformers a checkpoint.
    """

    code: str
    block_rows: int
    block_columns: int

    label: ClassVar[str] = "float8"
    names: ClassVar[tuple[str, ...]] = ("weight", "scale")

    def check(self, tensors: Sequence[Tensor]) -> None:
        if self.code not in CODES:
            raise ValueError(f"codes of {self.code} came, but must be of {', '.join(CODES)}")
        if min(self.block_rows, self.block_columns) < 1:
            raise ValueError(f"blocks of {self.block_rows} × {self.block_columns} came: too small")
        blocks = -(-self.rows // self.block_rows), -(-self.columns // self.block_columns)
        code: torch.dtype = getattr(torch, self.code)
        fits = [((self.rows, self.columns), (code,)), (blocks, _SCALES)]
        check_shapes(self.names, tensors, fits)

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        codes, scale = tensors
        codes = codes[first : first + len(out)]
        wide = place_for(out, torch.float32)
        widen(codes, wide)
        scale = of_rows(scale, first, len(out), self.block_rows)
        _multiply(wide, scale.float(), self.block_columns)
        return out if wide is out else out.copy_(wide)


def _multiply(values: Tensor, scale: Tensor, width: int) -> None:
    """Each ``width`` columns by their scale; the last ones may be fewer."""
    whole = values.shape[1] // width
    if whole:
        values[:, : whole * width].unflatten(1, (whole, width)).mul_(scale[:, :whole, None])
    if whole < scale.shape[1]:
        values[:, whole * width :].mul_(scale[:, whole:])


def widen(codes: Tensor, out: Tensor) -> None:
    """The codes as float32, which holds them exactly, to ``out``."""
    if codes.device.type == "cpu" and codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = _halves(codes)  # torch widens e4m3 one by one, which takes eight times as long
    out.copy_(codes)


def _halves(codes: Tensor) -> Tensor:
    """The codes as float16, which holds those of e4m3fn and e5m2 exactly."""
    bits = codes.view(torch.int8).to(torch.int16)
    if codes.dtype == torch.float8_e5m2:  # the upper half of a float16
        return bits.bitwise_left_shift_(8).view(torch.float16)
    # The sign, then all else where float16's mantissa has its highest bits.  Only NaN grows into
    # the exponent's highest bit when one is added, and with that set it is float16's NaN.
    bits.bitwise_left_shift_(7).bitwise_and_(0xBF80 - 2**16)
    bits |= (bits + 0x80) & 0x4000
    return bits.view(torch.float16).mul_(2.0**8)  # whose exponent's bias is greater by 8
