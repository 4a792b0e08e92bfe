"""Integers of 1 to 8 bits: a row, block or group shares a scale and, optionally, a zero point.

Also torchao's weight-only tensors of integers and of float8, as the weight of a
``torch.nn.Linear``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.other_packages import PLAIN, derived_from, is_class
from .arithmetic import write_scaled
from .float8 import Float8
from .format import FLOATS, Coding, Expected, Format, Quantized, name_of, of_rows
from .opaque import Opaque
from .vendor import PackedLayer, checked

# torchao's dequantize_affine computes the same bits for whole blocks of rows, but makes more
# copies.  With it a float32 step with 512 rows and a 2048² weight in groups of 64 takes 1.19 × the
# time and 1.96 × the peak memory, a bfloat16 step 1.14 × and 1.56 × (process time, one thread,
# torchao 0.18).


@dataclass(frozen=True)
class Affine(Format):
    """weight = (code - zero_point) · (``factor`` · scale), as torchao and LLM.int8 dequantize.

    codes int8 [rows, columns], of ``bits`` bits; scale and, if ``shifted``, zero_point [rows /
    block_rows, columns / block_columns].  The difference has out's dtype, and ``factor`` · scale
    the scale's.  Their product is computed in the wider dtype and rounded once.
    """

    bits: int
    block_rows: int
    block_columns: int
    shifted: bool = False
    factor: float = 1.0

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    def expected(self) -> Expected:
        shape, block = (self.rows, self.columns), (self.block_rows, self.block_columns)
        if min(block) < 1 or self.rows % block[0] or self.columns % block[1]:
            raise ValueError(f"blocks of {block} don't divide a weight of shape {shape}")
        blocks = self.rows // block[0], self.columns // block[1]
        expected: Expected = {"codes": (shape, (torch.int8,)), "scale": (blocks, FLOATS)}
        return expected | ({"zero_point": (blocks, (torch.int8, *FLOATS))} if self.shifted else {})

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        codes, groups = tensors[0][first : first + len(out)], out
        # Each is [n, columns / block_columns], or [1, …] if one block holds all n rows.
        numbers = [of_rows(each, first, len(out), self.block_rows) for each in tensors[1:]]
        if self.block_columns < self.columns:
            codes, groups = (x.unflatten(1, (-1, self.block_columns)) for x in (codes, out))
            numbers = [each.unsqueeze(2) for each in numbers]
        scale, *zero_point = numbers[0] * self.factor, *numbers[1:]
        if zero_point:
            groups.copy_(codes).sub_(zero_point[0].to(out.dtype)).mul_(scale)
        else:
            write_scaled(groups, codes, scale)
        return out

    @property
    def coding(self) -> Coding | None:
        """Only for weights with one scale a row and without zero points."""
        if self.shifted or (self.block_rows, self.block_columns) != (1, self.columns):
            return None
        return Coding("int8", 1, 0, factor=self.factor)


class Int4(Opaque):
    """weight = code · scale + zero_point in float32: torchao's ``Int4Tensor``.

    packed [rows, columns / 2] holds two signed codes in a byte, the code of an even column in the
    low bits; scale and zero_point [columns / group, rows].  torchao has no function for it.
    """

    label: ClassVar[str] = "int4"
    names: ClassVar[tuple[str, ...]] = ("packed", "scale", "zero_point")

    def values(self, *tensors: Tensor) -> Tensor:
        packed, (scale, zero) = tensors[0].view(torch.int8), (t.T.float() for t in tensors[1:])
        # A right shift of int8 extends the sign of the code at its top.
        codes = torch.stack([packed << 4 >> 4, packed >> 4], 2).view(self.rows, -1, self.group)
        return (codes * scale[..., None]).add_(zero[..., None]).flatten(1)


# torchao's tensors.


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    if getattr(kind, "forward", None) is not nn.Linear.forward:
        return False
    weight = layer._parameters.get("weight")
    if weight is None or type(weight) in PLAIN:  # torch.compile can't walk their bases
        return False
    return derived_from(type(weight), "torchao", "TorchAOBaseTensor") is not None


@checked("its {0.weight.__class__.__name__} is")
def read(layer: Any) -> PackedLayer | str:
    weight, name = layer.weight, type(layer.weight).__name__
    if not is_class(type(weight), "torchao.quantization", name) or name not in _READ:
        laid = ": its numbers lie as one kernel reads them" if name.startswith("Int4") else ""
        return f"its weight is torchao's {name}, which no format reads{laid}"
    if weight.dim() != 2:
        return f"its weight has shape {tuple(weight.shape)}"
    if getattr(weight, "act_pre_scale", None) is not None:
        return "its input is scaled before its weight is used (act_pre_scale)"
    if rounds_to := _rounds_to(weight):
        return (
            f"its input is rounded to {rounds_to} in every call, through which torchao gives no "
            "gradient: what trains before it gets a wrong one"
        )
    return _READ[name](weight)


def _rounds_to(weight: Any) -> str:
    """The name of the numbers that a call rounds its input to; "": it keeps its input."""
    if getattr(weight, "activation_dtype", torch.bfloat16) != torch.bfloat16:
        return "float8"
    names = "act_quant_kwargs", "activation_quantization"
    if all(getattr(weight, name, None) is None for name in names):
        return ""
    return "float8" if weight.qdata.is_floating_point() else "8 bits"


def _whole_numbers(weight: Any) -> PackedLayer:
    (rows, columns), (height, width) = weight.shape, map(int, weight.block_size)
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    shifted = not _is_zero(weight)
    tensors = weight.qdata, weight.scale.view(rows // height, -1), weight.zero_point
    format = Affine(rows, columns, bits, height, width, shifted)
    # Without ``shifted``, the format has no zero_point.
    return PackedLayer(Quantized(format, tensors[: len(format.names)]))


def _int4(weight: Any) -> PackedLayer | str:
    (rows, columns), (height, group) = weight.shape, map(int, weight.block_size)
    if height != 1:
        return f"its groups are blocks of {(height, group)}"
    format = Int4(rows, columns, 4, group, name_of(weight.scale.dtype))
    return PackedLayer(Quantized(format, (weight.qdata, weight.scale, weight.zero_point)))


def _float8(weight: Any) -> PackedLayer:
    rows, columns = weight.shape
    # Without block_size, the whole weight has one scale.
    height, width = map(int, weight.block_size or (rows, columns))
    format = Float8(rows, columns, name_of(weight.qdata.dtype), height, width)
    tensors = weight.qdata, weight.scale.view(-(-rows // height), -1)
    return PackedLayer(Quantized(format, tensors))


_READ: dict[str, Callable[[Any], PackedLayer | str]] = {
    "Int8Tensor": _whole_numbers,
    "IntxUnpackedToInt8Tensor": _whole_numbers,
    "Int4Tensor": _int4,
    "Float8Tensor": _float8,
}


def _is_zero(weight: Any) -> bool:
    """Whether all zero points are 0, as symmetric quantization makes them.

    On a GPU this waits for the device, but a layer is read only if it changed.  While torch.compile
    traces, values can't be read.
    """
    zero: Tensor | None = weight.zero_point
    return zero is None or not (torch.compiler.is_compiling() or bool(torch.any(zero)))
