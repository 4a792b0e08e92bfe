"""The dropout mask: a function of (seed, row, column), however the rows are cut into blocks.

Every row and every column has an odd key of 32 bits, 2 · (hash of its number ^ half the seed) + 1:
rows with the lower half, columns with the upper one.  An element's word is the product of its two
keys, modulo 2³².  An element is kept if the word's upper half, read as an int16, is at least
round(p · 2¹⁶) - 2¹⁵.  So the probability is exact to 2⁻¹⁶, which is coarse for a p beyond 0.999.
An element costs one multiplication, because hashes are computed only per row and per pair of
columns.

Two rows are correlated if the ratio of their keys, modulo 2³², is a ratio of two small numbers; the
same holds for two columns.  About n² of 2³⁰ pairs have a ratio of numbers up to n, and a few pairs
of 2³¹ have equal keys.  Masks need seeds whose 64 bits are all random.  Don't use this as a source
of random numbers for anything else.

The mask takes only integer arithmetic that wraps, on whole tensors: it runs on any device and never
reads the seed back to the host.  On a CPU ``threshold_backward`` clears elements in one pass over
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
# Two columns beside each other share a hash, multiplied by this number (from PCG) for the second.
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
        self.least = min(round(p * 2**16), 2**16 - 1) - 2**15  # a kept word's upper half, an int16
        self.row_keys, self.column_keys = _keys(seed, shape)

    def of_rows(self, rows: Tensor | slice) -> "DropoutMask":
        """The mask of these rows: a slice, or int64 [count] in any order."""
        chosen = copy(self)
        chosen.row_keys = self.row_keys[rows]
        return chosen

    def rows(self, first: int, count: int) -> Tensor:
        """bool [count, columns], from row ``first`` on: true where an element is kept."""
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
        if integer != torch.int32:
            words, highest = words.bitwise_right_shift_(16), self.least - 1
            words = SCRATCH.matrix_like("halves", x, integer).copy_(words)
        for x, out in tensors:
            _keep_above(x.view(integer), words, highest, grad_input=out.view(integer))


def _keys(seed: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The int32 keys of every row [rows, 1] and of every column [columns]."""
    rows, columns = shape
    low: Any
    high: Any
    # Outside of tracing and transforms, a CPU's seed can be read.
    followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if seed.is_cpu and not followed and not torch._C._are_functorch_transforms_active():
        # 2 · half + 1 for both halves at once: the "or" puts each half's 1 in, also where the
        # shift carries the top bit of the lower half over into the upper one.
        doubled = (int(seed.item()) << 1 | 0x1_0000_0001) & (2**64 - 1)
        low, high = _HALVES.unpack(doubled.to_bytes(8, "little"))
        return _kept_hashes("rows", rows) ^ low, _kept_hashes("columns", columns) ^ high
    low, high = seed.view(1).view(torch.int32) * 2 + 1
    return _hashes("rows", rows, seed.device) ^ low, _hashes("columns", columns, seed.device) ^ high


@lru_cache(maxsize=1024)  # views: with few rows, making one takes longer than the product
def _kept_hashes(of: str, count: int) -> Tensor:
    return _first_hashes(of, count.bit_length())[:count]


@lru_cache(maxsize=64)
def _first_hashes(of: str, bits: int) -> Tensor:
    """The hashes of all numbers with so many bits.  Each count takes the first of them."""
    # A tensor made in inference mode could not be used by later calls outside of it.
    with torch.inference_mode(False):
        return _hashes(of, 2**bits, torch.device("cpu"))


def _hashes(of: str, count: int, device: torch.device) -> Tensor:
    """Even int32 hashes: [count, 1] for "rows", [count] for "columns"."""
    if of == "rows":
        return _hash(torch.arange(count, dtype=torch.int32, device=device)).unsqueeze(1)
    pairs = _hash(~torch.arange((count + 1) // 2, dtype=torch.int32, device=device))
    return torch.stack([pairs, pairs * _OF_THE_SECOND], 1).flatten()[:count]


def _hash(numbers: Tensor) -> Tensor:
    """Replace each int32 by twice its hash, in place."""
    for multiplier, shift in _ROUNDS:
        numbers *= multiplier
        numbers ^= (numbers >> shift) & (2 ** (32 - shift) - 1)  # a logical shift
    return numbers.mul_(2)


def dropout_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The whole keep mask, bool [rows, columns], that a seed (int64, one element) makes."""
    return DropoutMask(seed, shape, p).rows(0, shape[0])
