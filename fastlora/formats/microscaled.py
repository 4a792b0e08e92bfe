"""Numbers of 4 bits with a floating point (e2m1), and a scale for each block of a row.

OCP's Microscaling Formats specification 1.0 has MXFP4; NVFP4 is NVIDIA's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.utils._python_dispatch import _disable_current_modes

from .arithmetic import place_for, scales_of, widen
from .format import Coding, Expected, Format

# What the 16 codes stand for: a sign, two bits of an exponent, one of a mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *[-value for value in _MAGNITUDES])

# Elements that are made at once: what that needs stays in a core's cache.
_AT_ONCE = 2**20


class _E2M1(Format):
    """packed uint8 or int8 [rows, columns / 2], the code of an even column in the low bits; and
    scale [rows, columns / ``block``]."""

    block: ClassVar[int]
    scales: ClassVar[tuple[torch.dtype, ...]]

    @property
    def blocks(self) -> int:
        """How many a row has.  Raises ValueError where they don't fill it."""
        if self.columns % self.block:
            raise ValueError(
                f"a row of the weight has {self.columns} numbers, but a block of {self.label} has "
                f"{self.block}: they don't fill it"
            )
        return self.columns // self.block

    def expected(self) -> Expected:
        packed = (self.rows, self.columns // 2), (torch.uint8, torch.int8)
        return [packed, ((self.rows, self.blocks), self.scales)]

    @property
    def coding(self) -> Coding:
        return Coding("four-bit", 1, self.block, E2M1, low_first=True)

    def coded(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        packed, scale, *tensor_scale = tensors
        packed = packed.view(torch.uint8)
        if scale.dtype == torch.float32:
            return packed, scale
        table, one, none = _tables(scale.dtype, scale.device)
        factor = tensor_scale[0].view(-1) if tensor_scale else one
        return packed, scale.view(torch.uint8), factor, table, none


@dataclass(frozen=True)
class MXFP4(_E2M1):
    """weight = code · scale of its block of 32 in a row, rounded once to out's dtype.

    packed uint8 or int8 [rows, columns / 2], the code of an even column in the low bits; scale
    [rows, columns / 32], uint8 or float8_e8m0fnu, is 2^(its bits - 127), and NaN for 255 (of which
    transformers makes 2¹²⁸ or infinity, if it is uint8); float32 stands for itself.
    """

    block: ClassVar[int] = 32
    scales: ClassVar = (torch.uint8, torch.float8_e8m0fnu, torch.float32)
    label: ClassVar[str] = "MXFP4"
    names: ClassVar[tuple[str, ...]] = ("packed", "scale")

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        packed, scale = (tensor[first : first + len(out)] for tensor in tensors)
        wide = torch.promote_types(out.dtype, torch.float32)
        return _write(packed, powers_of(scale), self.block, out, wide)


@dataclass(frozen=True)
class NVFP4(_E2M1):
    """weight = code · (scale of its block of 16 in a row · tensor_scale), each product float32's.

    packed as MXFP4's, scale float8_e4m3fn [rows, columns / 16], tensor_scale float32 [].
    So torchao dequantizes an NVFP4Tensor; without a scale for all it has 1.
    """

    block: ClassVar[int] = 16
    scales: ClassVar = (torch.float8_e4m3fn,)
    label: ClassVar[str] = "NVFP4"
    names: ClassVar[tuple[str, ...]] = ("packed", "scale", "tensor_scale")

    def expected(self) -> Expected:
        return [*super().expected(), ((), (torch.float32,))]

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        packed, codes = (tensor[first : first + len(out)] for tensor in tensors[:2])
        scale = torch.empty(codes.shape, dtype=torch.float32, device=out.device)
        scale.mul_(widen(codes, scale))
        return _write(packed, scale.mul_(tensors[2]), self.block, out, torch.float32)


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


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For kernels: what each of 256 codes of a scale stands for, a factor 1 and a term 0."""
    # Cached for all calls, so no mode may see how they are made; a capture is such a mode.
    with _disable_current_modes(), DisableTorchFunction(), torch.inference_mode(False):
        codes = torch.arange(256, dtype=torch.uint8, device=device)
        is_e4m3 = dtype == torch.float8_e4m3fn
        table = codes.view(dtype).float() if is_e4m3 else powers_of(codes)
        one = torch.ones(1, dtype=torch.float32, device=device)
        return table, one, torch.zeros((), dtype=torch.float32, device=device)
