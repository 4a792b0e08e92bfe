"""Whole numbers of 8 bits with a scale for each row: LLM.int8's, and others' like it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Format, check_shapes
from .scales import write_scaled

_SCALES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Int8Rows(Format):
    """weight = codes · (``factor`` · scale): int8 [N, K] and a scale [N] of any floating dtype.

    LLM.int8's scale is a row's largest magnitude, and its factor 1 / 127.  The factor is multiplied
    in the scale's dtype; the product in float32 or out's, if that is wider, and it is rounded once.
    """

    factor: float = 1.0

    @property
    def label(self) -> str:
        return "int8"

    @property
    def names(self) -> tuple[str, ...]:
        return "codes", "scale"

    def check(self, tensors: Sequence[Tensor]) -> None:
        expected = (((self.rows, self.columns), (torch.int8,)), ((self.rows,), _SCALES))
        check_shapes(self.names, tensors, expected)

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        codes, scale = (tensor[first : first + len(out)] for tensor in tensors)
        scale = scale.unsqueeze(1)
        scale = scale if self.factor == 1.0 else scale.mul(self.factor)
        return write_scaled(out, codes, scale)
