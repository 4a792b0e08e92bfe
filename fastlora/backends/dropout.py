"""The dropout mask: a function of (seed, row, column), however the rows are cut into blocks.

All integers have 32 bits and wrap.  ``low`` and ``high`` are the halves of the 64-bit seed:

    row_key(i)    = 2 · (hash(i) ^ low) + 1
    column_key(j) = 2 · (column_hash(j) ^ high) + 1
                    column_hash(2 j) = hash(~j), column_hash(2 j + 1) = c · hash(~j)
    word(i, j)    = row_key(i) · column_key(j)
    keep(i, j)    = (word(i, j) >> 16) >= round(p · 2¹⁶) - 2¹⁵      words are signed

Keys are odd, so multiplication by a key permutes the words.  ~j, not j, so that row j and column
2 j have different hashes.  The upper 16 bits of a word are uniform in [-2¹⁵, 2¹⁵ - 1], so P(an
element is dropped) = round(p · 2¹⁶) / 2¹⁶.  That is exact to 2⁻¹⁶, which is coarse for p > 0.999.
An element costs one multiplication, because hashes are computed only per row and per pair of
columns.

Rows i and j are correlated if row_key(i) / row_key(j) = a / b (mod 2³²) for small integers a and b;
the same holds for columns.  About n² of 2³⁰ pairs have such a ratio with a, b <= n, and a few of
2³¹ pairs have equal keys.  All 64 bits of a seed must be random.  Don't use the mask as a source of
random numbers for anything else.

The mask is computed by integer operations on whole tensors, so it runs on any device.  On a GPU the
host never reads the seed.  On a CPU ``threshold_backward`` zeroes dropped elements in one pass over
integers of the elements' size, several times faster than a bool mask.
"""

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from .products import Scratch

SCRATCH = Scratch()
# Multipliers and shifts, from Wellons' hash lowbias32; as an int32 the second one is negative.
_ROUNDS = (0x7FEB352D, 16), (0x846CA68B - 2**32, 15)
# c: columns 2 j and 2 j + 1 share one hash, which is multiplied by c (from PCG) for the second.
_OF_THE_SECOND = 0x2C9277B5
_HALVES = Struct("<ii")
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# out = x where word > highest, else 0
_keep_above = torch.ops.aten.threshold_backward.grad_input


class DropoutMask:
    """The keep mask [rows, columns] of one projection, made on demand for a range of rows."""

    def __init__(self, seed: Tensor, shape: Sequence[int], p: float) -> None:
        """``seed``: int64, one element, on the device of the mask."""
        self.p = p
        self.least = _least(p)
        self.row_keys, self.column_keys = _keys(seed, shape)

    def of_rows(self, rows: Tensor | slice) -> "DropoutMask":
        """The mask of these rows: a slice, or int64 [count] in any order."""
        chosen = copy(self)
        chosen.row_keys = self.row_keys[rows]
        return chosen

    def rows(self, first: int, count: int) -> Tensor:
        """The mask of rows first … first + count - 1: bool [count, columns], true where kept."""
        # word >= least · 2¹⁶ is the same test as (word >> 16) >= least.
        return self.row_keys[first : first + count] * self.column_keys >= self.least << 16

    def drop(self, first: int, *tensors: tuple[Tensor, Tensor]) -> None:
        """For each (x, out): write mask ∘ x [count, columns] to ``out``, which may be x itself.

        Row 0 of each x is row ``first`` of the mask.  All tensors have one dtype.  A dropped
        element becomes +0, also if it was NaN or infinity.
        """
        x, _ = tensors[0]
        if not x.is_cpu:
            keep = self.rows(first, len(x))
            for x, out in tensors:
                # Integer arithmetic on the bits of x, because 0 · NaN is NaN in floats.
                integer = _INTEGER_OF_SIZE[x.element_size()]
                torch.mul(x.view(integer), keep, out=out.view(integer))
            return
        if self.least == -(2**15):  # the least int16, so every element is kept
            for x, out in tensors:
                out.copy_(x)
            return
        integer = _INTEGER_OF_SIZE[x.element_size()]
        words, highest = SCRATCH.matrix_like("words", x, torch.int32), (self.least << 16) - 1
        torch.mul(self.row_keys[first : first + len(x)], self.column_keys, out=words)
        if integer != torch.int32:  # compare upper halves, in integers of the elements' size
            words, highest = words.bitwise_right_shift_(16), self.least - 1
            words = SCRATCH.matrix_like("halves", x, integer).copy_(words)
        for x, out in tensors:
            _keep_above(x.view(integer), words, highest, grad_input=out.view(integer))


def _keys(seed: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The int32 keys of every row [rows, 1] and of every column [columns]."""
    rows, columns = shape
    low: Any
    high: Any
    # Read a CPU's seed on the host, except under a compiler, a dispatch mode or a transform, where
    # it may have no value.
    is_traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if seed.is_cpu and not is_traced and not torch._C._are_functorch_transforms_active():
        low, high = _doubled_halves(int(seed.item()))
        return _kept_hashes("rows", rows) ^ low, _kept_hashes("columns", columns) ^ high
    low, high = seed.view(1).view(torch.int32) * 2 + 1
    return _hashes("rows", rows, seed.device) ^ low, _hashes("columns", columns, seed.device) ^ high


def _doubled_halves(seed: int) -> tuple[int, int]:
    """2 · lower half + 1 and 2 · upper half + 1, as int32, by one shift of the 64 bits."""
    # The shift moves the lower half's top bit into bit 32, and the "or" sets that bit to 1.
    doubled = (seed << 1 | 0x1_0000_0001) & (2**64 - 1)
    return _HALVES.unpack(doubled.to_bytes(8, "little"))


def _least(p: float) -> int:
    """The least upper half of a word, an int16, whose element is kept."""
    return min(round(p * 2**16), 2**16 - 1) - 2**15


# The cache holds views.  With few rows, creating a view takes longer than the product of keys.
@lru_cache(maxsize=1024)
def _kept_hashes(axis: str, count: int) -> Tensor:
    return _first_hashes(axis, count.bit_length())[:count]


@lru_cache(maxsize=64)
def _first_hashes(axis: str, bits: int) -> Tensor:
    """The hashes of 0 … 2^bits - 1.  All counts with this bit length use the first of them."""
    # A tensor made in inference mode could not be used by later calls outside of it.
    with torch.inference_mode(False):
        return _hashes(axis, 2**bits, torch.device("cpu"))


def _hashes(axis: str, count: int, device: torch.device) -> Tensor:
    """2 · hash of each row or column: int32, [count, 1] for "rows", [count] for "columns".

    The result ^ (2 · half + 1) is the key 2 · (hash ^ half) + 1.
    """
    if axis == "rows":
        return _hash(torch.arange(count, dtype=torch.int32, device=device)).unsqueeze(1)
    pairs = _hash(~torch.arange((count + 1) // 2, dtype=torch.int32, device=device))
    return torch.stack([pairs, pairs * _OF_THE_SECOND], 1).flatten()[:count]


def _hash(numbers: Tensor) -> Tensor:
    """2 · hash of each int32, in place."""
    for multiplier, shift in _ROUNDS:
        numbers *= multiplier
        numbers ^= (numbers >> shift) & (2 ** (32 - shift) - 1)  # a logical shift
    return numbers.mul_(2)


def dropout_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The whole keep mask, bool [rows, columns], that a seed (int64, one element) makes."""
    return DropoutMask(seed, shape, p).rows(0, shape[0])


def dropped_of_few_rows(seed: int, shape: Sequence[int], p: float) -> Tensor:
    """~:func:`dropout_mask` on a CPU by numpy, which takes 4 µs for one row instead of 12."""
    low, high = _doubled_halves(seed)
    rows, columns = map(_hashes_in_numpy, ("rows", "columns"), shape)
    return torch.from_numpy((rows ^ low) * (columns ^ high) < _least(p) << 16)


@lru_cache(maxsize=1024)
def _hashes_in_numpy(axis: str, count: int) -> Any:
    return _kept_hashes(axis, count).numpy()
