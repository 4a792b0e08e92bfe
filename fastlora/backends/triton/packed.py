"""Packed weights for the Triton kernels: what they read themselves, and dense ones of the rest."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.utils._python_dispatch import _disable_current_modes

from ...formats.float8 import Float8
from ...formats.format import Format, Quantised
from ...formats.four_bit import FourBit
from ...formats.integers import Int8Rows
from ...formats.microscaled import E2M1, MXFP4, NVFP4, powers_of
from ...projection import Base, Layout, Output, flatten, unflatten
from ..protocol import Call
from .cover import LONGEST, kernels

# More blocks than a weight has: they share one outer scale.
_ALL = 2**40


def has_kernel(format: Format, of_experts: bool = False) -> bool:
    """Whether kernels make this format's weights.  What they don't, torch's operations do.

    ``of_experts``: those of all experts at once.
    """
    if isinstance(format, FourBit):
        lies_in_rows = format.columns % max(2, format.block) == 0
        count = format.columns if lies_in_rows else format.rows * format.columns
        fits = (lies_in_rows and not format.nested) or not of_experts
        return _is_power(format.block) and format.block > 1 and count <= LONGEST and fits
    if isinstance(format, MXFP4 | NVFP4):
        return format.columns <= LONGEST
    if isinstance(format, Float8):
        fits = not of_experts or format.rows % min(format.rows, format.block_rows) == 0
        return format.code == "float8_e4m3fn" and all(map(_is_power, _blocks_of(format))) and fits
    return isinstance(format, Int8Rows)


def packed_of(weight: Quantised) -> "kernels.Packed":
    """The weight as kernels read it, of a format that has one."""
    (format, tensors), (*lead, rows, columns) = weight, weight.shape
    one = _packed(format, tensors, rows, columns)
    if not lead:
        return one
    return replace(one, experts=lead[0], block_rows=one.block_rows or rows)


def _packed(format: Format, tensors: Sequence[Tensor], rows: int, columns: int) -> "kernels.Packed":
    if isinstance(format, FourBit):
        codes, scales, *outer = tensors
        return kernels.Packed(
            kernels.FOUR_BIT, codes, scales, rows, columns, 1, format.block,
            table=format.code, outer=tuple(outer) or None, outer_block=format.nested,
        )  # fmt: skip
    if isinstance(format, MXFP4 | NVFP4):
        return _packed_e2m1(format, tensors)
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


def _packed_e2m1(format: MXFP4 | NVFP4, tensors: Sequence[Tensor]) -> "kernels.Packed":
    codes, scales, *tensor_scale = tensors
    rows, columns, block = format.rows, format.columns, format.block
    outer, outer_block = None, _ALL
    if scales.dtype != torch.float32:
        table, one, none = _tables(scales.dtype, scales.device)
        outer = (tensor_scale[0].view(-1) if tensor_scale else one), table, none
        scales = scales.view(torch.uint8)
    if tensor_scale and tensor_scale[0].dim():  # one of each expert
        outer_block = rows * columns // block
    return kernels.Packed(
        kernels.FOUR_BIT, codes.view(torch.uint8), scales, rows, columns, 1, block,
        table=E2M1, outer=outer, outer_block=outer_block, low_first=True,
    )  # fmt: skip


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What each of 256 scales of an MXFP4 or NVFP4 stands for, a factor 1 and a term 0."""
    # Kept for all calls: nobody's mode sees how they are made, the recorder's of a script for one.
    with _disable_current_modes(), DisableTorchFunction(), torch.inference_mode(False):
        bits = torch.arange(256, dtype=torch.uint8, device=device)
        is_e4m3 = dtype == torch.float8_e4m3fn
        table = bits.view(dtype).float() if is_e4m3 else powers_of(bits)
        one = torch.ones(1, dtype=torch.float32, device=device)
        return table, one, torch.zeros((), dtype=torch.float32, device=device)


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

    That is new memory, one weight's or that of all experts, in x's dtype.
    """
    if not isinstance(weight, Quantised):
        return weight
    packed = packed_of(weight)
    return packed if unpacks else kernels.dequant(packed, x.new_empty(weight.shape))


def needs_torch(call: Call) -> bool:
    """Whether a weight is of a format that no kernel reads."""
    return any([_is_torch_s(layout, call) for layout in call.layouts])


def made_dense(inputs: Sequence[Tensor], call: Call) -> tuple[list[Tensor], Call]:
    """The inputs of a call, with weights of such formats made dense in x's dtype, and the call."""
    x, *flat = inputs
    outputs, layouts = [], []
    for (base, adapters), layout in zip(unflatten(flat, call.layouts), call.layouts, strict=True):
        if _is_torch_s(layout, call) and isinstance(base.weight, Quantised):
            base, layout = Base(base.weight.dense(x.dtype), base.bias), layout._replace(format=None)
        outputs.append(Output(base, adapters))
        layouts.append(layout)
    return [x, *flatten(outputs, layouts)], call._replace(layouts=tuple(layouts))


def of_dense(
    run: Callable[..., list[Tensor | None]],
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: Call,
) -> list[Tensor | None]:
    """What this backward makes where weights have formats that no kernel reads."""
    needs_x, *rest = needs
    inputs, dense = made_dense(inputs, call)
    needs = [needs_x, *flatten(unflatten(rest, call.layouts), dense.layouts)]
    dx, *gradients = run(dys, inputs, hs, needs, seeds, dense)
    return [dx, *flatten(unflatten(gradients, dense.layouts), call.layouts)]


def _is_torch_s(layout: Layout, call: Call) -> bool:
    of_experts = call.rows is not None and not call.rows.shares_base
    return layout.format is not None and not has_kernel(layout.format, of_experts)


def _blocks_of(format: Float8) -> tuple[int, int]:
    """Of rows and of columns; 0 where there is one."""
    height = 0 if format.block_rows >= format.rows else format.block_rows
    return height, 0 if format.block_columns >= format.columns else format.block_columns


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
