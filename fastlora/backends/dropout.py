"""The dropout mask: a function of (seed, row, column), however the rows are cut into blocks.

Every row and every column has an odd key of 32 bits, 2 · (hash of its number ^ half the seed) + 1:
rows with the lower half, columns with the upper one.  An element's word is the product of its two
keys, modulo 2³².  It is kept where the word's upper half, read as an int16, is at least
round(p · 2¹⁶) - 2¹⁵: so the probability is right to 2⁻¹⁶ (a p beyond 0.999 is coarse).  An element
costs one multiplication; the hashes are those of a row and of a pair of columns.

Two rows are correlated if the ratio of their keys, modulo 2³², is one of small numbers, and so are
two columns: with about n² of 2³⁰ pairs it is one of numbers up to n, and some of 2³¹ have one key.
This makes masks, from seeds whose 64 bits are all drawn; it is not a source of random numbers for
anything else.

All of it is integer arithmetic that wraps, on whole tensors: it runs on any device and never reads
the seed back to the host.  On a CPU elements are cleared by ``threshold_backward``, in one pass
over integers of their size: several times faster than by a bool mask.
"""

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from .products import matrix_like

# Multipliers and shifts, from Wellons' hash lowbias32; as an int32 the second one is negative.
_ROUNDS = (0x7FEB352D, 16), (0x846CA68B - 2**32, 15)
# Two columns beside each other share a hash; the second one's is multiplied by this, from PCG.
_OF_THE_SECOND = 0x2C9277B5
_HALVES = Struct("<ii")
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# out = x where word > highest, else 0
_keep_above = torch.ops.aten.threshold_backward.grad_input


class DropoutMask:
    """The keep mask [rows, columns] of one projection, made on demand for a range of rows."""

    def __init__(self, seed: Tensor, shape: Sequence[int], p: float) -> None:
        """``seed``: int64, one element, on the device of the mask."""
        self.p, self.least = p, _least(p)
        self.row_keys, self.column_keys = _keys(seed, shape)

    def from_row(self, start: int) -> "DropoutMask":
        """The same mask without the rows before this one."""
        rest = copy(self)
        rest.row_keys = self.row_keys[start:]
        return rest

    def of_rows(self, numbers: Tensor) -> "DropoutMask":
        """The mask of these rows, int64 [count], in their order."""
        chosen = copy(self)
        chosen.row_keys = self.row_keys[numbers]
        return chosen

    def rows(self, first: int, count: int) -> Tensor:
        """bool [count, columns], from row ``first`` on: true where an element is kept."""
        return self.row_keys[first : first + count] * self.column_keys >= self.least << 16

    def drop(self, first: int, *tensors: tuple[Tensor, Tensor]) -> None:
        """For each (x, out): write mask ∘ x [count, columns] to ``out``, which x itself may be.

        Their rows are those of the mask from ``first`` on; all have the same dtype.  What is
        dropped is gone, NaN and infinity too.
        """
        x, _ = tensors[0]
        if not x.is_cpu:
            keep = self.rows(first, len(x))
            for x, out in tensors:
                # By integer arithmetic on the bits of x: what is dropped becomes +0.
                integer = _INTEGER_OF_SIZE[x.element_size()]
                torch.mul(x.view(integer), keep, out=out.view(integer))
            return
        if self.least == -(2**15):  # nothing is dropped, for no word is below that
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
            _keep_above(x.view(integer), words, highest, grad_input=out.view(integer))


def _least(p: float) -> int:
    """The least upper half of a word that is kept, as the int16 that it is."""
    return min(round(p * 2**16), 2**16 - 1) - 2**15


def _keys(seed: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """int32, of every row [rows, 1] and of every column [columns]."""
    rows, columns = shape
    low: Any
    high: Any
    if _is_here(seed):
        # Of each half, 2 · half + 1: what the lower one carries over becomes that 1.
        doubled = (int(seed.item()) << 1 | 0x1_0000_0001) & (2**64 - 1)
        low, high = _HALVES.unpack(doubled.to_bytes(8, "little"))
        return _kept_hashes("rows", rows) ^ low, _kept_hashes("columns", columns) ^ high
    low, high = seed.view(1).view(torch.int32) * 2 + 1
    return _hashes("rows", rows, seed.device) ^ low, _hashes("columns", columns, seed.device) ^ high


def _is_here(seed: Tensor) -> bool:
    """Whether its number can be read: on a CPU, where nothing follows operations."""
    followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return seed.is_cpu and not followed and not torch._C._are_functorch_transforms_active()


@lru_cache(maxsize=1024)  # views, which a few rows have no time to make
def _kept_hashes(of: str, count: int) -> Tensor:
    return _first_hashes(of, count.bit_length())[:count]


@lru_cache(maxsize=64)
def _first_hashes(of: str, bits: int) -> Tensor:
    """Of all numbers with so many bits, of which any count takes the first."""
    with torch.inference_mode(False):  # what is made inside could not be used outside
        return _hashes(of, 2**bits, torch.device("cpu"))


def _hashes(of: str, count: int, device: torch.device) -> Tensor:
    """int32, even: [count, 1] of so many "rows", [count] of "columns"."""
    if of == "rows":
        return _hash(torch.arange(count, dtype=torch.int32, device=device)).unsqueeze(1)
    pairs = _hash(~torch.arange((count + 1) // 2, dtype=torch.int32, device=device))
    return torch.stack([pairs, pairs * _OF_THE_SECOND], 1).flatten()[:count]


def _hash(numbers: Tensor) -> Tensor:
    """In the place of each int32, twice a hash of it."""
    for multiplier, shift in _ROUNDS:
        numbers *= multiplier
        numbers ^= (numbers >> shift) & (2 ** (32 - shift) - 1)  # without copies of the sign
    return numbers.mul_(2)


def dropout_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The whole keep mask, bool [rows, columns], of a seed (int64, one element)."""
    row_keys, column_keys = _keys(seed, shape)
    return row_keys * column_keys >= _least(p) << 16
