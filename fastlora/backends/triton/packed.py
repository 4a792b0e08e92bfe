"""Packed weights for the Triton kernels: formats that kernels read, dense weights for others."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...call.projection import Base, Layout, Output, flatten, unflatten
from ...formats.format import Format, Quantized
from ..protocol import BackwardCall, Call
from .supported import LONGEST, kernels

# More blocks than any weight has, so that all its blocks share one outer scale.
_ALL = 2**40


def has_kernel(format: Format, of_experts: bool = False) -> bool:
    """Whether kernels can unpack this format.  torch's operations unpack the others.

    ``of_experts``: whether they can unpack all experts' weights at once.  Then every expert must
    begin a new block.
    """
    coding, rows, columns = format.coding, format.rows, format.columns
    if coding is None:
        return False
    height, width = coding.block_rows, coding.block_columns
    if height & (height - 1) or width & (width - 1):  # no powers of two
        return False
    lies_in_rows = kernels.lies_in_rows(coding.kind, columns, width)
    if of_experts and (not lies_in_rows or coding.outer_block or rows % (height or 1)):
        return False
    return (columns if lies_in_rows else rows * columns) <= LONGEST


def packed_of(weight: Quantized) -> "kernels.Packed":
    """The record that kernels read.  The format must have a kernel (:func:`has_kernel`)."""
    (format, tensors), (*lead, rows, columns) = weight, weight.shape
    coding, (codes, scales, *outer) = format.coding, format.coded(tensors)
    assert coding is not None
    # block_rows 0 means all rows, but a block must not go on in the next expert.
    if lead:
        coding = coding._replace(block_rows=coding.block_rows or rows)
    if not coding.outer_block:
        each_has_one = outer and len(outer[0]) > 1  # an outer scale for each expert
        blocks = rows * columns // coding.block_columns if each_has_one else _ALL
        coding = coding._replace(outer_block=blocks)
    shape = {"rows": rows, "columns": columns, "experts": lead[0] if lead else 0}
    operands = {"codes": codes, "scales": scales, "outer": tuple(outer) or None}
    return kernels.Packed(**shape, **operands, **coding._asdict())


def is_unpackable(weights: Sequence[Tensor | Quantized]) -> bool:
    """Whether one launch of ``gemm_lowrank`` can read all of these weights in packed form."""
    packed = [packed_of(weight) for weight in weights if isinstance(weight, Quantized)]
    alike = all([each.lies_in_rows and each.is_like(packed[0]) for each in packed])
    return alike and len(packed) == len(weights)


def read_by(
    weight: Tensor | Quantized, x: Tensor, unpacks: bool = False
) -> "Tensor | kernels.Packed":
    """The operand of a product with x.

    A plain weight is returned unchanged.  A packed one becomes the kernels' record if the product
    ``unpacks``, else a new dense weight (of all experts) in x's dtype.
    """
    if not isinstance(weight, Quantized):
        return weight
    packed = packed_of(weight)
    return packed if unpacks else kernels.dequant(packed, x.new_empty(weight.shape))


def rounded(x: Tensor, precision: str, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scales): the rows of x (or dy), rounded to 8 bits."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty(len(x), dtype=torch.float32)
    kernels.quantize_rows(x, codes, scales, factors, precision=precision)
    return codes, scales


@lru_cache(maxsize=1024)
def needs_torch(layouts: tuple[Layout, ...], of_experts: bool = False) -> bool:
    """Whether one of the weights has a format that no kernel reads."""
    return any(_is_for_torch(layout, of_experts) for layout in layouts)


def made_dense(inputs: Sequence[Tensor], call: Call) -> tuple[list[Tensor], Call]:
    """The call with dense weights, in x's dtype, in place of formats that no kernel reads."""
    x, *flat = inputs
    outputs, layouts = [], []
    of_experts = call.rows is not None and not call.rows.has_one_base
    for (base, adapters), layout in zip(unflatten(flat, call.layouts), call.layouts, strict=True):
        if _is_for_torch(layout, of_experts) and isinstance(base.weight, Quantized):
            base = Base(base.weight.dense(x.dtype), base.bias)
            layout = layout._replace(format=None, weights=1)
        outputs.append(Output(base, adapters))
        layouts.append(layout)
    return [x, *flatten(outputs, layouts)], call._replace(layouts=tuple(layouts))


def of_dense(
    run: Callable[[BackwardCall], list[Tensor | None]], given: BackwardCall
) -> list[Tensor | None]:
    """Run the backward ``run`` with dense weights in place of formats that no kernel reads."""
    (needs_x, *needs), layouts = given.needs, given.call.layouts
    inputs, call = made_dense(given.inputs, given.call)
    # In flat lists, a packed weight has an entry for each of its tensors, and a dense one has one.
    needs = [needs_x, *flatten(unflatten(needs, layouts), call.layouts)]
    dx, *gradients = run(given._replace(inputs=inputs, needs=needs, call=call))
    return [dx, *flatten(unflatten(gradients, call.layouts), layouts)]


def _is_for_torch(layout: Layout, of_experts: bool) -> bool:
    format = layout.format
    # 8-bit products have launchers of their own, which read the codes.
    if format is None or format.product == "int8":
        return False
    return not has_kernel(format, of_experts)
