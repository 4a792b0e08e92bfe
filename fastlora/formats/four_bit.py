"""Numbers of 4 bits that name entries of a table of 16, with a scale for each block: NF4 and FP4.

Dettmers et al., "QLoRA" (arXiv 2305.14314), as bitsandbytes stores them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from .format import Format, check_shapes, of_rows

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# A magnitude of 3 bits; the fourth is the sign.
_FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
    0.1666666716337204, 0.25,
)  # fmt: skip
CODES = {"nf4": _NF4, "fp4": (*_FP4, *[-value for value in _FP4])}

# What bitsandbytes' kernel makes, and from which size of block on it has another, slow one.
_THEIRS, _TOO_LARGE = (torch.float32, torch.bfloat16, torch.float16), 2048

# Elements that are made at once: what that needs stays in a core's cache.
_AT_ONCE = 2**17


@dataclass(frozen=True)
class FourBit(Format):
    """weight = table[code] · absmax of its block, over the weight's elements in a row.

    Packed uint8 [⌈NK / 2⌉], the first of two elements in the high bits.  ``block`` elements share
    an absmax, which need not end with a row.  It is float32 [⌈NK / block⌉]; or, with ``nested``
    (how many share a scale of their own; 0: none), uint8 codes:

    absmax = code2[absmax codes] · absmax2 + offset

    with absmax2 float32 [⌈number of blocks / nested⌉], code2 float32 [256] and offset float32 [].
    """

    kind: str  # "nf4" or "fp4"
    block: int
    nested: int = 0
    dims: ClassVar[int] = 1

    @property
    def label(self) -> str:
        return self.kind.upper()

    @property
    def code(self) -> tuple[float, ...]:
        """The table of 16."""
        return CODES[self.kind]

    @property
    def names(self) -> tuple[str, ...]:
        return ("packed", "absmax", *(("absmax2", "code2", "offset") if self.nested else ()))

    def check(self, tensors: Sequence[Tensor]) -> None:
        if self.kind not in CODES:
            raise ValueError(f"its kind is {self.kind!r}, but must be one of {', '.join(CODES)}")
        if self.block < 1 or self.nested < 0:
            raise ValueError(f"its blocks are of {self.block} and {self.nested}, but must be of 1")
        count = self.rows * self.columns
        blocks = -(-count // self.block)
        wide, narrow = (torch.float32,), (torch.uint8,)
        expected: list = [
            (((count + 1) // 2,), narrow),
            ((blocks,), narrow if self.nested else wide),
        ]
        if self.nested:
            expected += [((-(-blocks // self.nested),), wide), ((256,), wide), ((), wide)]
        check_shapes(self.names, tensors, expected)

    def make(
        self, tensors: Sequence[Tensor], first: int, count: int, dtype: torch.dtype
    ) -> Tensor | None:
        """By bitsandbytes' own kernel, where somebody has imported it and has its op on a CPU.

        Not where a block ends inside a row: version 0.50 then takes another block's absmax, on CPUs
        with AVX-512.
        """
        packed, block, columns = tensors[0], self.block, self.columns
        if packed.device.type != "cpu" or columns % block or dtype not in _THEIRS:
            return None
        op = getattr(torch.ops.bitsandbytes, "dequantize_4bit", None)
        if op is None or block >= _TOO_LARGE:
            return None
        begin, end = first * columns, (first + count) * columns
        absmax = self._absmax(tensors, begin // block, end // block)
        some = packed[begin // 2 : end // 2]
        return op(some, absmax, block, self.kind, (count, columns), dtype)

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        columns, at_once = self.columns, max(1, _AT_ONCE // self.columns)
        for start in range(0, len(out), at_once):
            some = out[start : start + at_once]
            begin = (first + start) * columns
            self._make(tensors, begin, begin + some.numel(), some)
        return out

    def _make(self, tensors: Sequence[Tensor], begin: int, end: int, out: Tensor) -> None:
        """The elements from ``begin`` to ``end`` of the weight, in a row."""
        block, head, tail = self.block, begin % 2, end % 2  # of a byte, that others have
        odd = head or tail or out.storage_offset() % 2
        apart = odd or out.dtype != torch.float32 or not out.is_contiguous()
        if apart:
            made = torch.empty(end - begin + head + tail, dtype=torch.float32, device=out.device)
        else:
            made = out.view(-1)
        packed = tensors[0][begin // 2 : (end + 1) // 2]
        table, pairs = _pairs(self.kind, out.device), made.view(torch.float64)
        torch.index_select(table, 0, packed.int(), out=pairs)
        made = made[head : head + end - begin]
        first, last = begin // block, -(-end // block)
        absmax = self._absmax(tensors, first, last)
        if begin % block == 0 and end % block == 0:
            made.view(-1, block).mul_(absmax.unsqueeze(1))
        else:
            made.mul_(of_rows(absmax, begin - first * block, end - begin, block))
        if apart:
            out.copy_(made.view(out.shape))

    def _absmax(self, tensors: Sequence[Tensor], first: int, last: int) -> Tensor:
        """Of the blocks from ``first`` to ``last``."""
        some = tensors[1][first:last]
        if not self.nested:
            return some
        _, _, absmax2, code2, offset = tensors
        each = of_rows(absmax2, first, last - first, self.nested)
        return code2.index_select(0, some.int()).mul_(each).add_(offset)


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """For each byte the two float32 that it names, as one float64 [256]."""
    with torch.inference_mode(False):  # what is made inside could not be used outside
        code = torch.tensor(CODES[kind], dtype=torch.float32, device=device)
        byte = torch.arange(256, dtype=torch.int64, device=device)
        pairs = torch.stack([code[byte >> 4], code[byte & 15]], 1)
        return pairs.view(torch.float64).squeeze(1)
