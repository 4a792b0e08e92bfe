"""HQQ: groups of a row, whose numbers of 1 to 8 bits lie packed across the matrix of all groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .format import Format, check_shapes, place_for

# By the bits of a number: how many an element of W_q holds, and its dtype.
_PACKED = {
    8: (1, torch.uint8),
    4: (2, torch.uint8),
    3: (10, torch.int32),
    2: (4, torch.uint8),
    1: (8, torch.uint8),
}


@dataclass(frozen=True)
class Hqq(Format):
    """(numbers - zero) · scale in the dtype ``compute``, of groups of ``group`` weights in a row.

    The groups are the rows of a matrix.  W_q has in its row i, from the highest bits on, the
    numbers of group i, of i + len(W_q), of i + 2 len(W_q) …; scale and zero are [groups, 1].
    """

    bits: int
    group: int
    compute: str

    names: ClassVar[tuple[str, ...]] = ("W_q", "scale", "zero")

    @property
    def label(self) -> str:
        return f"HQQ {self.bits} bit"

    def check(self, tensors: Sequence[Tensor]) -> None:
        if self.bits not in _PACKED:
            raise ValueError(f"{self.bits} bits came, but HQQ has 1, 2, 3, 4 or 8")
        if self.group < 1 or self.columns % self.group:
            raise ValueError(f"groups of {self.group} don't divide rows of {self.columns}")
        (count, dtype), groups = _PACKED[self.bits], self.rows * self.columns // self.group
        each = ((groups, 1), (self.dtype,))
        packed = ((-(-groups // count), self.group), (dtype,))
        check_shapes(self.names, tensors, [packed, each, each])

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        packed, scale, zero = tensors
        per_row = self.columns // self.group
        groups = slice(first * per_row, (first + len(out)) * per_row)
        values = place_for(out, self.dtype, dense=True)
        of_groups = values.view(-1, self.group)
        self._unpack(packed, groups, of_groups)
        of_groups.sub_(zero[groups]).mul_(scale[groups])
        return out if values is out else out.copy_(values)

    def _unpack(self, packed: Tensor, groups: slice, out: Tensor) -> None:
        """The numbers of these groups, which begin in one field of W_q and may end in another."""
        count, total = _PACKED[self.bits][0], len(packed)
        for field in range(groups.start // total, (groups.stop - 1) // total + 1):
            start = field * total
            begin, end = max(groups.start, start), min(groups.stop, start + total)
            some = packed[begin - start : end - start] >> self.bits * (count - 1 - field)
            out[begin - groups.start : end - groups.start] = some & (2**self.bits - 1)
