"""Packed weights for the Triton kernels: what they read themselves, and dense ones of the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...formats.float8 import Float8
from ...formats.format import Format, Quantised
from ...formats.four_bit import FourBit
from ...formats.integers import Int8Rows
from ...projection import Base, Layout, Output, flatten, unflatten
from .cover import LONGEST, kernels


def has_kernel(format: Format) -> bool:
    """Whether kernels make this format's weights.  What they don't, torch's operations do."""
    if isinstance(format, FourBit):
        lies_in_rows = format.columns % format.block == 0
        count = format.columns if lies_in_rows else format.rows * format.columns
        return _is_power(format.block) and format.block > 1 and count <= LONGEST
    if isinstance(format, Float8):
        return format.code == "float8_e4m3fn" and all(map(_is_power, _blocks_of(format)))
    return isinstance(format, Int8Rows)


def packed_of(weight: Quantised) -> "kernels.Packed":
    """The weight as kernels read it, of a format that has one."""
    format, tensors = weight
    rows, columns = weight.shape
    if isinstance(format, FourBit):
        codes, scales, *outer = tensors
        return kernels.Packed(
            kernels.FOUR_BIT, codes, scales, rows, columns, 1, format.block,
            table=format.code, outer=tuple(outer) or None, outer_block=format.nested,
        )  # fmt: skip
    codes, scales = tensors
    if isinstance(format, Float8):
        if scales.dtype == torch.float8_e8m0fnu:  # few numbers, which no kernel reads
            scales = scales.float()
        bits = codes.view(torch.uint8)
        return kernels.Packed(kernels.FLOAT8, bits, scales, rows, columns, *_blocks_of(format))
    assert isinstance(format, Int8Rows)
    return kernels.Packed(
        kernels.INT8, codes, scales, rows, columns, 1, 0, factor=float(format.factor)
    )


def is_unpackable(weights: Sequence[Tensor | Quantised]) -> bool:
    """Whether one launch of a product can unpack all of these weights as it reads them."""
    if not all(isinstance(weight, Quantised) for weight in weights):
        return False
    packed = [packed_of(weight) for weight in weights if isinstance(weight, Quantised)]
    return all(each.lies_in_rows and each.is_like(packed[0]) for each in packed)


def are_plain(weights: Sequence[Tensor | Quantised]) -> bool:
    return all(isinstance(weight, Tensor) for weight in weights)


def read_by(
    weight: Tensor | Quantised, x: Tensor, unpacks: bool = False
) -> "Tensor | kernels.Packed":
    """What a product with x reads: the weight; or its codes, if it ``unpacks``; or a dense one.

    That is new memory, one weight's, in x's dtype.
    """
    if not isinstance(weight, Quantised):
        return weight
    packed = packed_of(weight)
    return packed if unpacks else kernels.dequant(packed, x.new_empty(weight.shape))


def needs_torch(layouts: Sequence[Layout]) -> bool:
    """Whether a weight is of a format that no kernel reads."""
    return any([layout.format is not None and not has_kernel(layout.format) for layout in layouts])


def made_dense(
    inputs: Sequence[Tensor], layouts: Sequence[Layout]
) -> tuple[list[Tensor], tuple[Layout, ...]]:
    """The inputs and layouts of a call, with weights of such formats made dense in x's dtype."""
    x, *flat = inputs
    outputs = [
        Output(Base(_dense(base.weight, x), base.bias), adapters)
        for base, adapters in unflatten(flat, layouts)
    ]
    dense = dense_layouts(layouts)
    return [x, *flatten(outputs, dense)], dense


def dense_layouts(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    return tuple(
        layout
        if layout.format is None or has_kernel(layout.format)
        else layout._replace(format=None)
        for layout in layouts
    )


def _dense(weight: Tensor | Quantised, x: Tensor) -> Tensor | Quantised:
    if isinstance(weight, Quantised) and not has_kernel(weight.format):
        return weight.dense(x.dtype)
    return weight


def _blocks_of(format: Float8) -> tuple[int, int]:
    """Of rows and of columns; 0 where there is one."""
    height = 0 if format.block_rows >= format.rows else format.block_rows
    return height, 0 if format.block_columns >= format.columns else format.block_columns


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
