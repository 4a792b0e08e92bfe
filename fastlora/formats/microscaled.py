"""MXFP4 and NVFP4: codes are floating-point numbers of 4 bits (e2m1), and a block has a scale.

OCP's Microscaling Formats specification 1.0 defines MXFP4; NVFP4 is NVIDIA's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.utils._python_dispatch import _disable_current_modes

from ..common.row_blocks import slices
from .arithmetic import place_for, scales_of, widen
from .format import Coding, Expected, Format

# Values of the 16 codes: a sign bit, two exponent bits, one mantissa bit.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *[-value for value in _MAGNITUDES])

# Elements that are dequantized at once, so that temporaries stay in a core's cache.
_AT_ONCE = 2**20


class _E2M1(Format):
    """packed uint8 or int8 [rows, columns / 2], scale [rows, columns / ``block``].

    The low bits of a byte hold the code of an even column.
    """

    block: ClassVar[int]
    scales: ClassVar[tuple[torch.dtype, ...]]

    @property
    def blocks(self) -> int:
        """The number of blocks in a row.  Raises ValueError where blocks don't fill the row."""
        if self.columns % self.block:
            raise ValueError(
                f"a row of the weight has {self.columns} numbers, but a block of {self.label} has "
                f"{self.block}: they don't fill it"
            )
        return self.columns // self.block

    def expected(self) -> Expected:
        packed = (self.rows, self.columns // 2), (torch.uint8, torch.int8)
        return {"packed": packed, "scale": ((self.rows, self.blocks), self.scales)}

    @property
    def coding(self) -> Coding:
        return Coding("four-bit", 1, self.block, E2M1, low_first=True)

    def coded(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        packed, scale, *tensor_scale = tensors
        packed = packed.view(torch.uint8)
        if scale.dtype == torch.float32:
            return packed, scale
        # Scales of 8 bits are codes themselves: kernels compute table[scale] · factor + 0.
        table, one, none = _tables(scale.dtype, scale.device)
        factor = tensor_scale[0].view(-1) if tensor_scale else one
        return packed, scale.view(torch.uint8), factor, table, none


@dataclass(frozen=True)
class MXFP4(_E2M1):
    """weight = code · scale of its block of 32 columns, rounded once to out's dtype.

    A scale of dtype uint8 or float8_e8m0fnu is 2^(bits - 127), and NaN for 255 (transformers reads
    a uint8 of 255 as 2¹²⁸ or infinity).  A float32 scale is used unchanged.
    """

    block: ClassVar[int] = 32
    scales: ClassVar = (torch.uint8, torch.float8_e8m0fnu, torch.float32)
    label: ClassVar[str] = "MXFP4"

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        packed, scale = (tensor[first : first + len(out)] for tensor in tensors)
        wide = torch.promote_types(out.dtype, torch.float32)
        return _write(packed, powers_of(scale), self.block, out, wide)


@dataclass(frozen=True)
class NVFP4(_E2M1):
    """weight = code · (scale of its block of 16 columns · tensor_scale), products in float32.

    scale is float8_e4m3fn, tensor_scale float32 [].  torchao dequantizes an NVFP4Tensor in the same
    way; a tensor without per_tensor_scale has tensor_scale 1.
    """

    block: ClassVar[int] = 16
    scales: ClassVar = (torch.float8_e4m3fn,)
    label: ClassVar[str] = "NVFP4"

    def expected(self) -> Expected:
        return super().expected() | {"tensor_scale": ((), (torch.float32,))}

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        packed, codes = (tensor[first : first + len(out)] for tensor in tensors[:2])
        scale = torch.empty(codes.shape, dtype=torch.float32, device=out.device)
        scale.mul_(widen(codes, scale))
        return _write(packed, scale.mul_(tensors[2]), self.block, out, torch.float32)


def _write(packed: Tensor, scale: Tensor, block: int, out: Tensor, wide: torch.dtype) -> Tensor:
    """Write codes · scales of their blocks, computed in the dtype ``wide``, to ``out``."""
    for rows in slices(len(out), _AT_ONCE // out.shape[1]):
        some = out[rows]
        values = place_for(some, wide)
        values.copy_(_halves(packed[rows]))
        scales = scales_of(values, scale[rows], 2.0**14)  # [step, blocks]
        values.unflatten(1, (-1, block)).mul_(scales[:, :, None])
        if values is not some:
            some.copy_(values)
    return out


def _halves(packed: Tensor) -> Tensor:
    """The values of the codes times 2⁻¹⁴, float16 [rows, columns].

    On a CPU this is faster than a table, because index_select uses only one thread.
    """
    # The product puts the code of an even column at the top of the low 16 bits, and the code of an
    # odd one at the top of the high 16 bits.  e2m1 is s ee m, float16 s eeeee mmmmmmmmmm: the shift
    # moves ee and m to the low exponent bits and the highest mantissa bit, and the mask clears the
    # rest.  The exponent biases are 1 and 15, hence 2⁻¹⁴.
    halves = packed.view(torch.uint8).int().mul_(2**12 + 2**24).view(torch.int16)
    halves.bitwise_right_shift_(3).bitwise_and_(0x8E00 - 2**16)
    return halves.view(torch.float16)


def powers_of(scale: Tensor) -> Tensor:
    """MXFP4's scales as float32."""
    if scale.dtype == torch.float32:
        return scale
    return scale.view(torch.float8_e8m0fnu).float()


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For kernels: the values of the 256 codes of a scale, a factor 1 and an offset 0."""
    # The cache keeps them for later calls, so no active mode (the capture of launches, for example)
    # may see how they are made.
    with _disable_current_modes(), DisableTorchFunction(), torch.inference_mode(False):
        codes = torch.arange(256, dtype=torch.uint8, device=device)
        is_e4m3 = dtype == torch.float8_e4m3fn
        table = codes.view(dtype).float() if is_e4m3 else powers_of(codes)
        one = torch.ones(1, dtype=torch.float32, device=device)
        return table, one, torch.zeros((), dtype=torch.float32, device=device)
