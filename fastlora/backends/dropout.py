"""The dropout mask: a function of (seed, row, column), however the rows are cut into blocks.

The low half of the seed and a row give a 32-bit row key, the high half and a pair of columns a
32-bit column key. Their exclusive or goes through two rounds of multiply and shift, and the two
16-bit halves of the result decide the two columns.  All of it is integer arithmetic that wraps, on
whole tensors: it runs on any device, on all of its threads, and never reads the seed back to the
host.

The upper bits come down by an addition, w + (w >> s), where other hashes have an exclusive or:
torch's shift copies the sign, which would fold the upper half onto its positive values.

An element is kept where its half, as a number in [0, 2¹⁶), is at least round(p · 2¹⁶), so that the
probability is right to 2⁻¹⁶ (a p beyond 0.999 is coarse).  Over a hundred masks, correlations
of about 0.001 show at distances of 8 columns or 2¹⁵ rows.  This makes masks; it is not a source of
random numbers for anything else.
"""

from collections.abc import Sequence
from copy import copy
from functools import lru_cache

import torch
from torch import Tensor


def _constant(value: int) -> Tensor:
    """A 0-d int32: an operation takes it on any device, in half the time of a Python number."""
    return torch.tensor(value if value < 2**31 else value - 2**32, dtype=torch.int32, device="cpu")


_ROW_STEP = _constant(0xC2B2AE35)  # a multiplier of MurmurHash3; 1 in its place shows in the tests
_COLUMN_STEP = _constant(0x9E3779B1)  # 2³² / golden ratio
_FIRST_MIX, _FIRST_SHIFT = _constant(0x7FEB352D), _constant(15)  # from Wellons' hash lowbias32
_SECOND_MIX, _SECOND_SHIFT = _constant(0x846CA68B), _constant(16)

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class DropoutMask:
    """The keep mask [rows, columns] of one projection, made on demand for a range of rows."""

    def __init__(self, seed: Tensor, shape: Sequence[int], p: float) -> None:
        """``seed``: int64, one element, on the device of the mask."""
        followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        plain = seed.device.type == "cpu" and not followed  # what was made may be kept
        unseeded = _unseeded if plain else _unseeded.__wrapped__
        rows, self.columns = shape
        steps = unseeded(rows, self.columns, p, seed.device)
        row_steps, column_steps, self.threshold = steps
        low, high = seed.view(torch.int32).unbind()
        self.row_keys, self.column_keys = row_steps + low, column_steps + high
        self.p = p

    def from_row(self, start: int) -> "DropoutMask":
        """The same mask without the rows before this one."""
        rest = copy(self)
        rest.row_keys = self.row_keys[start:]
        return rest

    def rows(self, first: int, count: int) -> Tensor:
        """int16 [count, columns], from row ``first`` on: 1 where an element is kept, else 0."""
        if count == 0:  # an empty tensor of 32 bits can't always be viewed as 16 bits
            return torch.empty(0, self.columns, dtype=torch.int16, device=self.row_keys.device)
        word = self.row_keys[first : first + count] ^ self.column_keys
        word.mul_(_FIRST_MIX)
        word.add_(word >> _FIRST_SHIFT)
        word.mul_(_SECOND_MIX)
        word.add_(word >> _SECOND_SHIFT)
        lanes = word.view(torch.int16)
        return (lanes if self.columns % 2 == 0 else lanes[:, :-1]).ge_(self.threshold)


@lru_cache(maxsize=16)  # at most 4 bytes a row and 2 a column each
def _unseeded(
    rows: int, columns: int, p: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What all masks of a shape share: their keys [rows, 1] and [pairs], less the seed's halves.

    And the least 16-bit half that is kept, as the int16 with its bits turned to be signed.
    """
    row_numbers = torch.arange(rows, dtype=torch.int32, device=device).unsqueeze(1)
    pairs = torch.arange((columns + 1) // 2, dtype=torch.int32, device=device)
    least = min(round(p * 2**16), 2**16 - 1) - 2**15
    threshold = torch.tensor(least, dtype=torch.int16, device="cpu")
    return row_numbers.mul_(_ROW_STEP), pairs.mul_(_COLUMN_STEP), threshold


def dropout_mask(seed: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """The whole keep mask, bool [rows, columns], of a seed (int64, one element)."""
    return DropoutMask(seed.reshape(1), shape, p).rows(0, shape[0]).bool()


def multiply_bits(x: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """x where ``keep`` is 1, +0 where it is 0, by integer arithmetic on the bits of x.

    Several times faster than multiplying or filling by a bool mask; what is dropped is gone, NaN
    and infinity too.
    """
    integer = _INTEGER_OF_SIZE[x.element_size()]
    if out is None:
        return torch.mul(x.view(integer), keep).view(x.dtype)
    torch.mul(x.view(integer), keep, out=out.view(integer))
    return out
