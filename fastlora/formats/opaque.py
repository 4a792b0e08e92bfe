"""A packed weight that its vendor's function dequantizes, the whole weight at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .format import Format


@dataclass(frozen=True)
class Opaque(Format):
    """Codes of ``bits`` bits; ``group`` codes share a scale.  Only :meth:`values` reads them.

    A product makes the whole dense weight.  Nothing checks the tensors before a product: the
    vendor's function raises if they don't fit.
    """

    bits: int
    group: int
    compute: str

    names: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]
    by_rows: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return f"{type(self).__name__} {self.bits} bit"

    def values(self, *tensors: Tensor) -> Tensor:
        """The whole weight [rows, columns], in any floating dtype and with any strides."""
        raise NotImplementedError

    def check(self, tensors: Sequence[Tensor]) -> None:
        pass

    def make(self, tensors: Sequence[Tensor], first: int, count: int, dtype: torch.dtype) -> Tensor:
        return self.values(*tensors)[first : first + count].to(dtype)
