"""The dropout mask: a function of (seed, row, column), however the rows are cut into blocks.

The low half of the seed and a row give a 32-bit row key, the high half and a pair of columns a
32-bit column key. Their exclusive or goes through two rounds of multiply and shift, and the two
16-bit halves of the result decide the two columns.  All of it is integer arithmetic that wraps, on
whole tensors: it runs on any device, on all of its threads, and never reads the seed back to the
host.  What one thread of a CPU takes at once is made by numpy, in the same words: a mask of a few
rows is all overhead, and numpy's is a third of torch's.

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
from typing import Any

import torch
from torch import Tensor

from ..blocks import GRAIN


def _constant(value: int) -> Tensor:
    """A 0-d int32: an operation takes it on any device, in half the time of a Python number."""
    return torch.tensor(value if value < 2**31 else value - 2**32, dtype=torch.int32, device="cpu")


_ROW_STEP = _constant(0xC2B2AE35)  # a multiplier of MurmurHash3; 1 in its place shows in the tests
_COLUMN_STEP = _constant(0x9E3779B1)  # 2³² / golden ratio
# A multiplier and a shift of each round, from Wellons' hash lowbias32.
_CONSTANTS = [_constant(value) for value in (0x7FEB352D, 15, 0x846CA68B, 16)]
_ROUNDS = *_CONSTANTS, torch.int16
_ARRAY_ROUNDS = *[each.numpy() for each in _CONSTANTS], "int16"

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class DropoutMask:
    """The keep mask [rows, columns] of one projection, made on demand for a range of rows."""

    def __init__(self, seed: Tensor, shape: Sequence[int], p: float) -> None:
        """``seed``: int64, one element, on the device of the mask."""
        rows, self.columns = shape
        self.p, self.device = p, seed.device
        # Keys and threshold are arrays in the one case, tensors in the other: both have the
        # operators that are used here.
        self.by_numpy = _is_array_s(seed)
        if self.by_numpy:
            keys = _array_keys(seed, rows, self.columns, p)
        else:
            keys = _tensor_keys(seed, rows, self.columns, p)
        self.row_keys, self.column_keys, self.threshold = keys

    def from_row(self, start: int) -> "DropoutMask":
        """The same mask without the rows before this one."""
        rest = copy(self)
        rest.row_keys = self.row_keys[start:]
        return rest

    def rows(self, first: int, count: int) -> Tensor:
        """bool [count, columns], from row ``first`` on: true where an element is kept."""
        if count == 0:  # an empty tensor of 32 bits can't always be viewed as 16 bits
            return torch.empty(0, self.columns, dtype=torch.bool, device=self.device)
        row_keys, column_keys = self.row_keys[first : first + count], self.column_keys
        if not self.by_numpy:
            return _kept(row_keys ^ column_keys, self.threshold, self.columns, _ROUNDS)
        # Numpy takes 5 µs for a tile's, row by row, and torch 2.
        word = torch.from_numpy(row_keys) ^ torch.from_numpy(column_keys)
        if count * self.columns > GRAIN:
            # torch shares it out to all threads.
            return _kept(word, torch.from_numpy(self.threshold), self.columns, _ROUNDS)
        return torch.from_numpy(_kept(word.numpy(), self.threshold, self.columns, _ARRAY_ROUNDS))


def _is_array_s(seed: Tensor) -> bool:
    """Whether numpy can make masks of this seed: on a CPU, where nothing follows operations."""
    followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return seed.is_cpu and not followed


def _kept(word: Any, threshold: Any, columns: int, rounds: Any) -> Any:
    """The mask of row keys ^ column keys, [rows, pairs], which is written over: tensor or array."""
    first_mix, first_shift, second_mix, second_shift, int16 = rounds
    word *= first_mix
    word += word >> first_shift
    word *= second_mix
    word += word >> second_shift
    lanes = word.view(int16)
    return (lanes if columns % 2 == 0 else lanes[:, :-1]) >= threshold


def _array_keys(seed: Tensor, rows: int, columns: int, p: float) -> tuple[Any, Any, Any]:
    """The keys of rows [rows, 1] and of pairs of columns [pairs]; and the threshold."""
    row_steps, column_steps, threshold = _arrays(rows, columns, p)
    number: Any = seed.item()
    low, high = ((number + 2**31) & (2**32 - 1)) - 2**31, number >> 32
    return row_steps + low, column_steps + high, threshold


def _tensor_keys(seed: Tensor, rows: int, columns: int, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same as tensors, on the seed's device."""
    row_steps, column_steps, threshold = _unseeded(rows, columns, p, seed.device)
    low, high = seed.view(1).view(torch.int32)
    return row_steps + low, column_steps + high, threshold


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


@lru_cache(maxsize=16)  # at most 4 bytes a row and 2 a column each
def _arrays(rows: int, columns: int, p: float) -> list[Any]:
    """The same, as arrays, and kept."""
    return [each.numpy() for each in _unseeded(rows, columns, p, torch.device("cpu"))]


def dropout_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The whole keep mask, bool [rows, columns], of a seed (int64, one element)."""
    rows, columns = shape
    if 0 < rows * columns <= GRAIN and _is_array_s(seed):  # at once: for few rows each call counts
        row_keys, column_keys, threshold = _array_keys(seed, rows, columns, p)
        word = row_keys ^ column_keys
        return torch.from_numpy(_kept(word, threshold, columns, _ARRAY_ROUNDS))
    return DropoutMask(seed, shape, p).rows(0, rows)


def as_integers(keep: Tensor, out: Tensor) -> Tensor:
    """The mask as integers, 1 and 0, of the size of out's elements and in the memory of ``out``.

    From a bool mask torch would make such a tensor in each product, and a new one.
    """
    return out.view(_INTEGER_OF_SIZE[out.element_size()]).copy_(keep)


def multiply_bits(x: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """x where ``keep`` is true or 1, +0 where it isn't, by integer arithmetic on the bits of x.

    Several times faster than multiplying or filling by a bool mask; what is dropped is gone, NaN
    and infinity too.
    """
    integer = _INTEGER_OF_SIZE[x.element_size()]
    if out is None:
        return torch.mul(x.view(integer), keep).view(x.dtype)
    torch.mul(x.view(integer), keep, out=out.view(integer))
    return out
