"""Numbers of 4 bits with a floating point (e2m1), and a scale for each block of a row.

OCP's Microscaling Formats specification 1.0 has MXFP4; NVFP4 is NVIDIA's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .float8 import scales_of, widen
from .format import Format, check_shapes, place_for

# What the 16 codes stand for: a sign, two bits of an exponent, one of a mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *[-value for value in _MAGNITUDES])

_BYTES = (torch.uint8, torch.int8)  # what two codes lie in
# Elements that are made at once: what that needs stays in a core's cache.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class MXFP4(Format):
    """weight = code · scale of its block of 32 in a row, rounded once to out's dtype.

    packed uint8 or int8 [rows, columns / 2], the code of an even column in the low bits; scale
    [rows, columns / 32], uint8 or float8_e8m0fnu, is 2^(its bits - 127), and NaN for 255 (of which
    transformers makes 2¹²⁸ or infinity, if it is uint8); float32 stands for itself.
    """

    block: ClassVar[int] = 32
    label: ClassVar[str] = "MXFP4"
    names: ClassVar[tuple[str, ...]] = ("packed", "scale")

    def check(self, tensors: Sequence[Tensor]) -> None:
        scales = (torch.uint8, torch.float8_e8m0fnu, torch.float32)
        check_shapes(self.names, tensors, _expected(self, scales))

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        packed, scale = (tensor[first : first + len(out)] for tensor in tensors)
        wide = torch.promote_types(out.dtype, torch.float32)
        return _write(packed, powers_of(scale), self.block, out, wide)


@dataclass(frozen=True)
class NVFP4(Format):
    """weight = code · (scale of its block of 16 in a row · tensor_scale), each product float32's.

    packed as MXFP4's, scale float8_e4m3fn [rows, columns / 16], tensor_scale float32 [].
    So torchao dequantises an NVFP4Tensor; without a scale for all it has 1.
    """

    block: ClassVar[int] = 16
    label: ClassVar[str] = "NVFP4"
    names: ClassVar[tuple[str, ...]] = ("packed", "scale", "tensor_scale")

    def check(self, tensors: Sequence[Tensor]) -> None:
        expected = _expected(self, (torch.float8_e4m3fn,))
        check_shapes(self.names, tensors, [*expected, ((), (torch.float32,))])

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        packed, codes = (tensor[first : first + len(out)] for tensor in tensors[:2])
        scale = torch.empty(codes.shape, dtype=torch.float32, device=out.device)
        scale.mul_(widen(codes, scale))
        return _write(packed, scale.mul_(tensors[2]), self.block, out, torch.float32)


def blocks_of(format: MXFP4 | NVFP4) -> int:
    """How many blocks a row has.  Raises ValueError where they don't fill it."""
    if format.columns % format.block:
        raise ValueError(
            f"a row of the weight has {format.columns} numbers, but a block of {format.label} has "
            f"{format.block}: they don't fill it"
        )
    return format.columns // format.block


def _expected(format: MXFP4 | NVFP4, scales: tuple[torch.dtype, ...]) -> list:
    """Shapes and dtypes of the codes and of the blocks' scales."""
    blocks = (format.rows, blocks_of(format)), scales
    return [((format.rows, format.columns // 2), _BYTES), blocks]


def _write(packed: Tensor, scale: Tensor, block: int, out: Tensor, wide: torch.dtype) -> Tensor:
    """Codes times their blocks' scales, computed in the dtype ``wide``, to ``out``, and it."""
    step = max(1, _AT_ONCE // out.shape[1])
    for first in range(0, len(out), step):
        rows = slice(first, first + step)
        some = out[rows]
        values = place_for(some, wide)
        values.copy_(_halves(packed[rows]))
        scales = scales_of(values, scale[rows], 2.0**14)
        values.unflatten(1, (-1, block)).mul_(scales[:, :, None])
        if values is not some:
            some.copy_(values)
    return out


def _halves(packed: Tensor) -> Tensor:
    """What the codes stand for, times 2⁻¹⁴, float16 [rows, columns].

    On a CPU faster than a table, which one thread alone looks up.
    """
    # Each code at the upper end of 16 bits; then all but its sign where e2m1's lowest bit is the
    # highest of float16's mantissa, whose exponent has a bias greater by 14.
    halves = packed.view(torch.uint8).int().mul_(2**12 + 2**24).view(torch.int16)
    halves.bitwise_right_shift_(3).bitwise_and_(0x8E00 - 2**16)
    return halves.view(torch.float16)


def powers_of(scale: Tensor) -> Tensor:
    """float32 of an MXFP4's scales."""
    if scale.dtype == torch.float32:
        return scale
    return scale.view(torch.float8_e8m0fnu).float()
