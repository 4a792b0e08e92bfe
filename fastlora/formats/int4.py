"""Signed numbers of 4 bits, two in a byte, with a scale and an offset for each group of a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Format, check_shapes

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Int4Groups(Format):
    """number · scale + zero_point: torchao's ``Int4Tensor``.

    packed int8 or uint8 [rows, columns / 2], the number of an even column in the low bits; scale
    and zero_point [columns / group, rows], of the dtype ``compute``.  A zero point is an offset of
    the weight's own unit.  Computed in out's dtype, or float32 if that is wider, and rounded once.
    """

    group: int
    compute: str

    @property
    def label(self) -> str:
        return "int4"

    @property
    def names(self) -> tuple[str, ...]:
        return "packed", "scale", "zero_point"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute)

    def check(self, tensors: Sequence[Tensor]) -> None:
        if self.columns % 2 or self.group < 1 or self.columns % self.group:
            raise ValueError(
                f"groups of {self.group} and pairs don't divide {self.columns} columns"
            )
        each = ((self.columns // self.group, self.rows), (self.dtype,))
        if self.dtype not in _FLOATS:
            raise ValueError(f"its scale has dtype {self.dtype}, but must be floating")
        packed = ((self.rows, self.columns // 2), (torch.int8, torch.uint8))
        check_shapes(self.names, tensors, [packed, each, each])

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        rows = slice(first, first + len(out))
        packed = tensors[0][rows].view(torch.int8)
        scale, zero = (tensor[:, rows].t().to(wide)[..., None] for tensor in tensors[1:])
        values = out
        if out.dtype != wide:
            values = torch.empty(out.shape, dtype=wide, device=out.device)
        # A shift to the right keeps the sign.
        values[:, 0::2] = (packed << 4) >> 4
        values[:, 1::2] = packed >> 4
        values.unflatten(1, (-1, self.group)).mul_(scale).add_(zero)
        return out if values is out else out.copy_(values)
