"""Whole numbers with a scale for each row, block or group of them, and perhaps an offset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .format import FLOATS, Format, check_shapes, of_rows, place_for, write_scaled


@dataclass(frozen=True)
class Int8Rows(Format):
    """weight = codes · (``factor`` · scale): int8 [N, K] and a scale [N] of any floating dtype.

    LLM.int8's scale is a row's largest magnitude, and its factor 1 / 127.  The factor is multiplied
    in the scale's dtype; the product in float32 or out's, if that is wider, and it is rounded once.
    """

    factor: float = 1.0

    label: ClassVar[str] = "int8"
    names: ClassVar[tuple[str, ...]] = ("codes", "scale")

    def check(self, tensors: Sequence[Tensor]) -> None:
        expected = (((self.rows, self.columns), (torch.int8,)), ((self.rows,), FLOATS))
        check_shapes(self.names, tensors, expected)

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        codes, scale = (tensor[first : first + len(out)] for tensor in tensors)
        scale = scale.unsqueeze(1)
        scale = scale if self.factor == 1.0 else scale.mul(self.factor)
        return write_scaled(out, codes, scale)


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
        expected = [(shape, (torch.int8,)), (blocks, FLOATS), (blocks, (torch.int8, *FLOATS))]
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


@dataclass(frozen=True)
class Int4Groups(Format):
    """number · scale + zero_point: torchao's ``Int4Tensor``, of signed numbers, two in a byte.

    packed int8 or uint8 [rows, columns / 2], the number of an even column in the low bits; scale
    and zero_point [columns / group, rows], of the dtype ``compute``.  A zero point is an offset of
    the weight's own unit.  Computed in out's dtype, or float32 if that is wider, and rounded once.
    """

    group: int
    compute: str

    label: ClassVar[str] = "int4"
    names: ClassVar[tuple[str, ...]] = ("packed", "scale", "zero_point")

    def check(self, tensors: Sequence[Tensor]) -> None:
        if self.columns % 2 or self.group < 1 or self.columns % self.group:
            raise ValueError(
                f"groups of {self.group} and pairs don't divide {self.columns} columns"
            )
        each = ((self.columns // self.group, self.rows), (self.dtype,))
        if self.dtype not in FLOATS:
            raise ValueError(f"its scale has dtype {self.dtype}, but must be floating")
        packed = ((self.rows, self.columns // 2), (torch.int8, torch.uint8))
        check_shapes(self.names, tensors, [packed, each, each])

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        rows = slice(first, first + len(out))
        packed = tensors[0][rows].view(torch.int8)
        scale, zero = (tensor[:, rows].t().to(wide)[..., None] for tensor in tensors[1:])
        values = place_for(out, wide)
        # A shift to the right keeps the sign.
        values[:, 0::2] = (packed << 4) >> 4
        values[:, 1::2] = packed >> 4
        values.unflatten(1, (-1, self.group)).mul_(scale).add_(zero)
        return out if values is out else out.copy_(values)
