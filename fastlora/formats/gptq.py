"""GPTQ: columns of a weight in groups, and the numbers of a column packed across int32 words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .format import FLOATS, Format, check_shapes, place_for


@dataclass(frozen=True)
class Gptq(Format):
    """(numbers - zeros) · scales in the dtype ``compute``; input k belongs to group g_idx[k].

    Numbers of 2, 3, 4 or 8 bits lie end to end in int32 words, from the lowest bit on: those of a
    row of the weight down a column of qweight [columns · bits / 32, rows], and zeros along a row of
    qzeros [groups, rows · bits / 32], as they are and not one less (version 2 of the format).
    scales is [groups, rows].  ``ordered``: that every group is ``columns / groups`` inputs in their
    order, so that g_idx needn't be looked at.
    """

    bits: int
    groups: int
    compute: str
    ordered: bool

    names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def label(self) -> str:
        return f"GPTQ {self.bits} bit"

    def check(self, tensors: Sequence[Tensor]) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"{self.bits} bits came, but GPTQ has 2, 3, 4 or 8")
        if self.groups < 1 or (self.ordered and self.columns % self.groups):
            raise ValueError(f"{self.groups} groups don't divide {self.columns} columns")
        ints = (torch.int32,)
        expected = [
            ((self._words(self.columns), self.rows), ints),
            ((self.groups, self._words(self.rows)), ints),
            ((self.groups, self.rows), (self.dtype,) if self.dtype in FLOATS else ()),
            ((self.columns,), (torch.int32, torch.int64)),
        ]
        check_shapes(self.names, tensors, expected)

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        qweight, qzeros, scales, g_idx = tensors
        rows = slice(first, first + len(out))
        values = place_for(out, self.dtype)
        values.copy_(self._numbers(qweight[:, rows], 0, self.columns).t())
        zeros = self._numbers(qzeros.t(), first, len(out)).to(self.dtype)  # [rows, groups]
        scale = scales[:, rows].t()
        if self.ordered:
            of_groups = values.unflatten(1, (self.groups, -1))
            of_groups.sub_(zeros[..., None]).mul_(scale[..., None])
        else:
            values.sub_(zeros[:, g_idx]).mul_(scale[:, g_idx])
        return out if values is out else out.copy_(values)

    def _words(self, count: int) -> int:
        return -(-count * self.bits // 32)

    def _numbers(self, words: Tensor, first: int, count: int) -> Tensor:
        """Some of the numbers that lie down the columns of words [words, n]: int32 [count, n]."""
        numbers = torch.arange(first, first + count, dtype=torch.int64, device=words.device)
        start = numbers * self.bits
        word, shift = start // 32, (start % 32).to(torch.int32)[:, None]
        numbers = words[word] >> shift
        if 32 % self.bits:  # some begin in one word and end in the next
            begun = (32 - shift).clamp(max=self.bits)  # bits
            numbers &= (1 << begun) - 1  # what is above is the word's sign
            rest = words[(word + 1).clamp(max=len(words) - 1)] << begun
            numbers |= torch.where(begun < self.bits, rest, 0)
        return numbers.bitwise_and_(2**self.bits - 1)
