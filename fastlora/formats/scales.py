"""Which scales belong to some rows, where a scale is for a block of them; codes times scales."""

import torch
from torch import Tensor

# Elements of 16 bits that are made at once.
_AT_ONCE = 2**18


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


def of_rows(values: Tensor, first: int, count: int, block_rows: int) -> Tensor:
    """Those of ``count`` rows from ``first`` on: [count, n], or [1, n] if they are in one block.

    ``values``: [blocks of rows, n].
    """
    some = values[first // block_rows : (first + count - 1) // block_rows + 1]
    if block_rows == 1 or len(some) == 1:
        return some
    ahead = first % block_rows
    return some.repeat_interleave(block_rows, 0)[ahead : ahead + count]
