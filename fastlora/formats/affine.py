"""Whole numbers with a scale, and perhaps a zero point, for each block of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Format, check_shapes
from .scales import of_rows, write_scaled

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Affine(Format):
    """(codes - zero_point) · scale, as torchao dequantises its integer tensors.

    codes int8 [rows, columns], of ``bits`` bits; scale and, if ``shifted``, zero_point [rows /
    block_rows, columns / block_columns].  The difference is out's dtype's, the product that of out
    and scale; it is rounded once.
    """

    bits: int
    block_rows: int
    block_columns: int
    shifted: bool

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    @property
    def names(self) -> tuple[str, ...]:
        return ("codes", "scale", "zero_point") if self.shifted else ("codes", "scale")

    def check(self, tensors: Sequence[Tensor]) -> None:
        shape, block = (self.rows, self.columns), (self.block_rows, self.block_columns)
        if min(block) < 1 or self.rows % block[0] or self.columns % block[1]:
            raise ValueError(f"blocks of {block} don't divide a weight of shape {shape}")
        blocks = self.rows // block[0], self.columns // block[1]
        expected = [(shape, (torch.int8,)), (blocks, _FLOATS), (blocks, (torch.int8, *_FLOATS))]
        check_shapes(self.names, tensors, expected[: len(self.names)])

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        codes = tensors[0][first : first + len(out)].unflatten(1, (-1, self.block_columns))
        groups = out.unflatten(1, (-1, self.block_columns))
        scale, *zero_point = [
            of_rows(values, first, len(out), self.block_rows)[..., None] for values in tensors[1:]
        ]
        if zero_point:
            groups.copy_(codes).sub_(zero_point[0].to(out.dtype)).mul_(scale)
        else:
            write_scaled(groups, codes, scale)
        return out
