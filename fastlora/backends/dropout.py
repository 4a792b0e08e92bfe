"""The dropout mask: a function of (seed, row, column), never stored, and the same however the rows are cut in blocks.

A seed and a row give a 32-bit row key, a pair of columns a 32-bit column key.  Their exclusive or goes through two
rounds of multiply and shift, and the two 16-bit halves of the result decide the two columns.  All of it is integer
arithmetic that wraps, on whole tensors: it runs on any device and never reads the seed back to the host.

An element is kept where its half, as a number in [0, 2¹⁶), is at least round(p · 2¹⁶), so that the probability is
right to 2⁻¹⁷.  This makes masks; it is not a source of random numbers for anything else.
"""

import torch
from torch import Tensor

_ROW_STEP = 0x9E3779B97F4A7C15 - 2**64  # 2⁶⁴ / golden ratio, as a signed number
_ROW_MIX = 0xD6E8FEB86659FD93 - 2**64
_COLUMN_STEP = 0x9E3779B1 - 2**32  # 2³² / golden ratio
_FIRST_MIX = 0x7FEB352D  # the multipliers and shifts of Wellons' hash lowbias32
_SECOND_MIX = 0x846CA68B - 2**32

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class DropoutMask:
    """The keep mask of one projection, made on demand for a range of rows."""

    def __init__(self, seed: Tensor, shape: tuple[int, int], p: float) -> None:
        """``seed``: int64, one element, on the device of the mask.  ``shape``: (rows, columns)."""
        rows, self.columns = shape
        self.threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
        key = torch.arange(rows, device=seed.device).mul_(_ROW_STEP).add_(seed)
        key ^= key >> 32
        self.row_keys = key.mul_(_ROW_MIX).bitwise_right_shift_(32).to(torch.int32).unsqueeze(1)  # [rows, 1]
        pairs = torch.arange((self.columns + 1) // 2, dtype=torch.int32, device=seed.device)
        self.column_keys = pairs.mul_(_COLUMN_STEP)

    def rows(self, rows: slice) -> Tensor:
        """int16 [len(rows), columns]: 1 where the element is kept, 0 where it is dropped."""
        word = self.row_keys[rows] ^ self.column_keys
        word *= _FIRST_MIX
        word ^= word >> 15
        word *= _SECOND_MIX
        word ^= word >> 16
        return word.view(torch.int16)[:, : self.columns].ge_(self.threshold)


def dropout_mask(seed: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """The whole keep mask, bool [rows, columns], of a seed (int64, one element): what the oracle is given."""
    return DropoutMask(seed, shape, p).rows(slice(None)).bool()


def multiply_bits(x: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    """out = x where ``keep`` is 1, +0 where it is 0, by integer arithmetic on the bits of x.  ``out`` may be x.

    Several times faster than multiplying or filling by a bool mask; what is dropped is gone, NaN and infinity too.
    """
    integer = _INTEGER_OF_SIZE[x.element_size()]
    torch.mul(x.view(integer), keep, out=out.view(integer))
    return out
