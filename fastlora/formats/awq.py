"""AWQ: groups of columns share a scale and a zero, and eight codes of 4 bits lie in an int32.

Also GPTQ-Model's layers that keep this layout, ``AwqTorchLinear`` and two for GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..foreign import is_class
from .format import FLOATS, Expected, Format, Quantized, name_of
from .vendor import PackedLayer, checked

# The shifts of the eight codes of a word, in the order of the rows of the weight.
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


@dataclass(frozen=True)
class Awq(Format):
    """weight = (code - zero) · scale in the dtype ``compute``, for groups of ``group`` columns.

    qweight int32 [columns, rows / 8] and qzeros int32 [columns / group, rows / 8] hold the codes
    and zeros of eight rows in a word; scales are [columns / group, rows].
    """

    group: int
    compute: str

    label: ClassVar[str] = "AWQ"

    def expected(self) -> Expected:
        if self.group < 1 or self.columns % self.group or self.rows % 8:
            raise ValueError(f"8 and {self.group} don't divide {self.rows} rows × {self.columns}")
        words, groups, ints = self.rows // 8, self.columns // self.group, (torch.int32,)
        return {
            "qweight": ((self.columns, words), ints),
            "qzeros": ((groups, words), ints),
            "scales": ((groups, self.rows), (self.dtype,) if self.dtype in FLOATS else ()),
        }

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        return out.copy_(self.make(tensors, first, len(out), out.dtype))

    def make(self, tensors: Sequence[Tensor], first: int, count: int, dtype: torch.dtype) -> Tensor:
        """The rows as the transpose of a new tensor, because a transposing copy is slow."""
        qweight, qzeros, scales = tensors
        codes, zeros = (_unpack(words, first, count) for words in (qweight, qzeros))
        codes = codes.unflatten(0, (-1, self.group)).sub_(zeros[:, None])  # [groups, group, count]
        values = codes * scales[:, None, first : first + count]
        return values.flatten(0, 1).to(dtype).t()


def _unpack(words: Tensor, first: int, count: int) -> Tensor:
    """Codes ``first`` to ``first + count`` of each row of words: int32 [n, words] -> [n, count]."""
    start = first // 8
    some = words[:, start : -(-(first + count) // 8), None]
    codes = some >> torch.tensor(_SHIFTS, dtype=torch.int32, device=words.device) & 15
    return codes.flatten(1)[:, first - 8 * start :][:, :count]


# GPTQ-Model's layers.

_PACKAGE = "gptqmodel.nn_modules.qlinear"
_READ = ("AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear")

PARTS: tuple[str, ...] = ("qweight",)


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    return any(is_class(kind, _PACKAGE, name) for name in _READ)


@checked("its quantization state is")
def read(layer: Any) -> PackedLayer | str:
    if layer.adapter is not None:
        return "it has an adapter of GPTQ-Model's"
    scales, columns = layer.scales, layer.in_features
    group = columns // len(scales)
    format = Awq(layer.out_features, columns, group, name_of(scales.dtype))
    tensors = tuple([getattr(layer, name).detach() for name in format.names])
    # The layer's own forward rounds a float32 x to float16.
    return PackedLayer(Quantized(format, tensors), rounds_input=True)


def pack(layer: Any, weight: Tensor) -> None:
    raise ValueError("AWQ's numbers are read, and not made: its rounding needs data")
