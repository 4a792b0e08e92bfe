"""The dropout mask: a function of (seed, row, column), however the rows are cut into blocks.

Every row and every column has a key of 32 bits: a hash of its number, plus the low half of the seed
or the high one, made odd.  An element's word is the product of its two keys, and it is kept where
the upper half of the word, as a number in [0, 2¹⁶), is at least round(p · 2¹⁶): so the probability
is right to 2⁻¹⁶ (a p beyond 0.999 is coarse).  An element costs one multiplication; the hashes are
those of a row and of a column.

Modulo 2³² a row's words are a permutation of the columns' keys, and those of two rows are as good
as independent: i · word = j · word of the other holds throughout only if it holds for their keys,
which for i and j up to n is so for about n² of 2³⁰ pairs.  The same goes for columns.  What isn't
independent are the words at all four corners of a rectangle; the bits of a mask don't show it.
This makes masks; it is not a source of random numbers for anything else.

All of it is integer arithmetic that wraps, on whole tensors: it runs on any device and never reads
the seed back to the host.  On a CPU an element is cleared by ``threshold_backward``, in one pass
over integers of its size: several times faster than by a bool mask.  What is dropped is gone, NaN
and infinity too.
"""

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .products import matrix_like

# Multipliers and shifts, from Wellons' hash lowbias32; as an int32 the second one is negative.
_ROUNDS = (0x7FEB352D, 16), (0x846CA68B - 2**32, 15)
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FEW = 2**15  # elements of a mask that numpy makes faster than torch's threads
_clear = torch.ops.aten.threshold_backward.grad_input


class DropoutMask:
    """The keep mask [rows, columns] of one projection, made on demand for a range of rows."""

    def __init__(self, seed: Tensor, shape: Sequence[int], p: float) -> None:
        """``seed``: int64, one element, on the device of the mask."""
        low, high = seed.view(1).view(torch.int32) * 2 + 1
        rows, columns = shape
        self.p, self.least = p, _least(p)
        self.row_keys = _keys("rows", rows, seed).unsqueeze(1) + low
        self.column_keys = _keys("columns", columns, seed) + high

    def from_row(self, start: int) -> "DropoutMask":
        """The same mask without the rows before this one."""
        rest = copy(self)
        rest.row_keys = self.row_keys[start:]
        return rest

    def rows(self, first: int, count: int) -> Tensor:
        """bool [count, columns], from row ``first`` on: true where an element is kept."""
        return self.row_keys[first : first + count] * self.column_keys >= self.least << 16

    def drop(self, first: int, *tensors: tuple[Tensor, Tensor]) -> None:
        """For each (x, out): write mask ∘ x [count, columns] to ``out``, which x itself may be.

        Their rows are those of the mask from ``first`` on; all have the same dtype.
        """
        x, _ = tensors[0]
        if not x.is_cpu:
            keep = self.rows(first, len(x))
            for x, out in tensors:
                multiply_bits(x, keep, out)
            return
        if self.least == -(2**15):  # nothing is dropped, and no threshold says so
            for x, out in tensors:
                out.copy_(x)
            return
        integer = _INTEGER_OF_SIZE[x.element_size()]
        words, highest = matrix_like("words", x, torch.int32), (self.least << 16) - 1
        torch.mul(self.row_keys[first : first + len(x)], self.column_keys, out=words)
        if integer != torch.int32:
            words, highest = words.bitwise_right_shift_(16), self.least - 1
            words = matrix_like("halves", x, integer).copy_(words)
        for x, out in tensors:
            _clear(x.view(integer), words, highest, grad_input=out.view(integer))


def _least(p: float) -> int:
    """The least upper half of a word that is kept, as the int16 that it is."""
    return min(round(p * 2**16), 2**16 - 1) - 2**15


def _keys(of: str, count: int, seed: Tensor) -> Tensor:
    """int32 [count] of so many "rows" or "columns", even, where the seed is; not yet seeded."""
    if _is_array_s(seed):
        return torch.from_numpy(_array_keys(of, count))
    return _new_keys(of, count, seed.device)


@lru_cache(maxsize=32)
def _array_keys(of: str, count: int) -> Any:
    return _new_keys(of, count, torch.device("cpu")).numpy()


def _new_keys(of: str, count: int, device: torch.device) -> Tensor:
    """Columns have the numbers below 0."""
    numbers = torch.arange(count, dtype=torch.int32, device=device)
    return _hash(~numbers if of == "columns" else numbers)


def _hash(numbers: Tensor) -> Tensor:
    """In the place of each int32, twice a hash of it."""
    for multiplier, shift in _ROUNDS:
        numbers *= multiplier
        numbers ^= (numbers >> shift) & (2 ** (32 - shift) - 1)  # without copies of the sign
    return numbers.mul_(2)


def _is_array_s(tensor: Tensor) -> bool:
    """Whether numpy can work beside this: on a CPU, where nothing follows operations."""
    followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return tensor.is_cpu and not followed


def dropout_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The whole keep mask, bool [rows, columns], of a seed (int64, one element)."""
    rows, columns = shape
    if rows * columns > _FEW or not _is_array_s(seed):
        return DropoutMask(seed, shape, p).rows(0, rows)
    # A few rows' mask is all overhead, and numpy has half of torch's.
    number: Any = seed.item()
    row_keys = _array_keys("rows", rows)[:, None] + _odd(number)
    column_keys = _array_keys("columns", columns) + _odd(number >> 32)
    return torch.from_numpy(row_keys * column_keys >= _least(p) << 16)


def _odd(number: Any) -> int:
    """2 · number + 1 as an int32."""
    return ((2 * number + 1 + 2**31) & (2**32 - 1)) - 2**31


def multiply_bits(x: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    """Write x where ``keep`` is true, and +0 elsewhere, by integer arithmetic on the bits of x."""
    integer = _INTEGER_OF_SIZE[x.element_size()]
    torch.mul(x.view(integer), keep, out=out.view(integer))
    return out
