"""What formats compute with: codes as numbers, and their scales, in pieces that a cache holds."""

import torch
from torch import Tensor

# Elements of 16 bits that are made at once.
_AT_ONCE = 2**18


def place_for(out: Tensor, dtype: torch.dtype, dense: bool = False) -> Tensor:
    """``out``, if it has this dtype, and if asked lies ``dense``; else a new tensor like it."""
    fits = out.dtype == dtype and (out.is_contiguous() or not dense)
    return out if fits else torch.empty(out.shape, dtype=dtype, device=out.device)


def write_scaled(out: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """out = codes · scale, rounded once, and it.  All have as many dimensions; scale's may be 1.

    The codes are whole numbers that out's dtype holds.
    """
    as_it_is = out.dtype == scale.dtype == torch.bfloat16 or out.element_size() != 2
    if as_it_is or out.device.type != "cpu" or not out.numel():
        return out.copy_(codes).mul_(scale)
    # By way of float32: torch's product takes 2 times as long in float16, 4 to 8 between dtypes.
    step = max(1, _AT_ONCE // out[0].numel())
    wide = torch.empty_like(out[:step], dtype=torch.float32, memory_format=torch.contiguous_format)
    for first in range(0, len(out), step):
        rows = slice(first, first + step)
        some = wide[: len(out) - first].copy_(codes[rows])
        out[rows].copy_(some.mul_(scale if len(scale) == 1 else scale[rows]))
    return out


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
    signed, unsigned = codes.view(torch.int8), codes.view(torch.uint8)
    return signed.amax().item() == 127 or unsigned.amax().item() == 255


def scales_of(values: Tensor, scale: Tensor, factor: float) -> Tensor:
    """scale · factor, a power of 2, for these values; or scale, and they are multiplied by it."""
    if factor == 1.0 or not scale.numel() or scale.abs().amax().item() < 2.0**100:
        return scale * factor
    values.mul_(factor)  # where the scales could become infinite
    return scale
