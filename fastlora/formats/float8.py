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
        factor = widen(codes, wide)
        scale = of_rows(scale, first, len(out), self.block_rows)
        _multiply(wide, scales_of(wide, scale.float(), factor), self.block_columns)
        return out if wide is out else out.copy_(wide)


def _multiply(values: Tensor, scale: Tensor, width: int) -> None:
    """Each ``width`` columns by their scale; the last ones may be fewer."""
    whole = values.shape[1] // width
    if whole:
        values[:, : whole * width].unflatten(1, (whole, width)).mul_(scale[:, :whole, None])
    if whole < scale.shape[1]:
        values[:, whole * width :].mul_(scale[:, whole:])


def widen(codes: Tensor, out: Tensor) -> float:
    """The codes, over the number that comes back, as float32 to ``out``: which holds them exactly.

    On a CPU torch converts e4m3 one by one, which takes eight times as long as by way of float16.
    """
    kind = codes.dtype if codes.device.type == "cpu" else None
    if kind == torch.float8_e5m2:  # the upper half of a float16
        out.copy_(codes.view(torch.int8).short().mul_(2**8).view(torch.float16))
    elif kind == torch.float8_e4m3fn and not _has_nan(codes):
        # The sign, then all else where float16's mantissa has its highest bits.
        halves = codes.view(torch.int8).short().mul_(2**7)  # torch shifts more slowly
        out.copy_(halves.bitwise_and_(0xBF80 - 2**16).view(torch.float16))
        return 2.0**8  # by which float16's exponent has a greater bias
    else:
        out.copy_(codes)
    return 1.0


def _has_nan(codes: Tensor) -> bool:
    """Whether one of e4m3fn's is: 127 or 255."""
    if not codes.numel():
        return False
    return (
        codes.view(torch.int8).amax().item() == 127 or codes.view(torch.uint8).amax().item() == 255
    )


def scales_of(values: Tensor, scale: Tensor, factor: float) -> Tensor:
    """scale · factor, a power of 2, for these values; or scale, and they are multiplied by it."""
    if factor == 1.0 or not scale.numel() or scale.abs().amax().item() < 2.0**100:
        return scale * factor
    values.mul_(factor)  # where the scales could become infinite
    return scale
