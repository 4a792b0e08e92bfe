"""Arithmetic of formats: conversion of codes and products with scales, in cache-sized pieces."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.row_blocks import rows_at_a_time, slices

# Elements per piece of a 16-bit output: the float32 copy of a piece is 1 MiB and stays in cache.
_AT_ONCE = 2**18


def place_for(out: Tensor, dtype: torch.dtype) -> Tensor:
    """``out`` if it has this dtype; otherwise a new tensor of its shape."""
    return out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=out.device)


def write_scaled(out: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """out = codes · scale, rounded once; returns out.  scale broadcasts, with as many dimensions.

    The codes are whole numbers that out's dtype represents exactly.
    """
    as_it_is = out.dtype == scale.dtype == torch.bfloat16 or out.element_size() != 2
    if as_it_is or out.device.type != "cpu" or not out.numel():
        return out.copy_(codes).mul_(scale)
    # Through float32: torch's product takes 2 × the time in float16, 4 to 8 × with mixed dtypes.
    step = max(1, _AT_ONCE // out[0].numel())
    wide = torch.empty_like(out[:step], dtype=torch.float32, memory_format=torch.contiguous_format)
    for rows in slices(len(out), step):
        some = wide[: rows.stop - rows.start].copy_(codes[rows])
        out[rows].copy_(some.mul_(scale if len(scale) == 1 else scale[rows]))
    return out


def widen(codes: Tensor, out: Tensor) -> float:
    """Write float8 codes to ``out`` (float32), divided by the factor that is returned; exact.

    On a CPU torch converts e4m3 one by one, which takes 8 × as long as this through float16.
    """
    kind = codes.dtype if codes.device.type == "cpu" else None
    if kind == torch.float8_e5m2:  # e5m2's bits are the upper byte of a float16
        out.copy_(codes.view(torch.int8).short().mul_(2**8).view(torch.float16))
    elif kind == torch.float8_e4m3fn and not _has_nan(codes):
        # e4m3 is s eeee mmm, float16 s eeeee mmmmmmmmmm.  The product moves eeee and mmm to the low
        # exponent bits and the high mantissa bits; the mask clears the sign's copy above them.
        halves = codes.view(torch.int8).short().mul_(2**7)  # faster than torch's shift
        out.copy_(halves.bitwise_and_(0xBF80 - 2**16).view(torch.float16))
        return 2.0**8  # the exponent biases are 15 and 7
    else:
        out.copy_(codes)
    return 1.0


def _has_nan(codes: Tensor) -> bool:
    """Whether a code of e4m3fn is NaN: 127 or 255."""
    if not codes.numel():
        return False
    signed, unsigned = codes.view(torch.int8), codes.view(torch.uint8)
    return signed.amax().item() == 127 or unsigned.amax().item() == 255


def packed_by_rows(
    weight: Tensor, pack: Callable[[Tensor], tuple[Tensor, ...]], multiple: int = 1
) -> tuple[Tensor, ...]:
    """The tensors that ``pack`` returns for the weight in float32, a block of rows at a time.

    Each block but the last has a multiple of ``multiple`` rows.
    """
    step = max(1, rows_at_a_time(weight) // multiple) * multiple
    parts = [pack(weight[rows].float().contiguous()) for rows in slices(len(weight), step)]
    return tuple([torch.cat(each) for each in zip(*parts, strict=True)])


def scales_of(values: Tensor, scale: Tensor, factor: float) -> Tensor:
    """scale · factor, where factor is a power of 2; or scale, after multiplying values by factor.

    The second happens only where scale · factor could become infinite.
    """
    if factor == 1.0 or not scale.numel() or scale.abs().amax().item() < 2.0**100:
        return scale * factor
    values.mul_(factor)
    return scale
