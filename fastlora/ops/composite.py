"""The composite path: the formula by torch's own operations.

It supports all modes and transforms of torch, and is the reference for second-order gradients.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ..backends.products import cast
from ..backends.protocol import Call
from ..call.projection import Adapter, Output, unflatten
from ..call.rows import Rows, Share, take
from ..formats.format import Quantized
from .dispatch import autocast_off

# drop(the adapter's number in the call, its rows of x, their segment or None) -> dropped rows.
Drop = Callable[[int, Tensor, Share | None], Tensor]


def run_composite(
    x: Tensor, outputs: Sequence[Output[Tensor]], drop: Drop | None, rows: Rows | None = None
) -> tuple[Tensor, ...]:
    """Every output of x.  x may be nested if ``rows`` is None.

    Each segment is computed separately, and its result is added to the rows of the segment.
    """
    if rows is None:
        return _of_rows(x, outputs, drop, None)
    matrix = x.reshape(-1, x.shape[-1])
    items = rows.items(len(matrix))
    widths = [output.base.weight.shape[-2] for output in outputs]
    if rows.has_one_base:
        ys = list(_of_rows(matrix, [Output(output.base) for output in outputs], drop, None))
    else:
        ys = [matrix.new_zeros(len(matrix), width) for width in widths]
    row_numbers = torch.arange(len(matrix), dtype=torch.int64, device=x.device)
    for share in rows.shares_of(len(matrix)) if len(matrix) else ():
        at = take(row_numbers.unsqueeze(1), share, items).flatten()  # the segment's rows
        parts = [rows.part(output, share.segment) for output in outputs]
        added = _of_rows(matrix[at], parts, drop, share)
        # Not in place, because autograd and the transforms of torch.func follow these operations.
        ys = [y.index_add(0, at, more) for y, more in zip(ys, added, strict=True)]
    return tuple([y.reshape(*x.shape[:-1], n) for y, n in zip(ys, widths, strict=True)])


def _of_rows(
    x: Tensor, outputs: Sequence[Output[Tensor]], drop: Drop | None, share: Share | None
) -> tuple[Tensor, ...]:
    """Every output of rows that all use the same weights: all rows of a call, or one segment."""
    ys, number = [], 0
    for (weight, bias), adapters in outputs:
        if isinstance(weight, Quantized):
            weight = weight.dense(x.dtype)
        y = None
        if weight is not None:
            y = linear(x, weight, cast(bias, weight.dtype))
        for adapter in adapters:
            y = _with_adapter(y, x if drop is None else drop(number, x, share), adapter)
            number += 1
        assert y is not None
        ys.append(y)
    return tuple(ys)


def _with_adapter(y: Tensor | None, x: Tensor, adapter: Adapter[Tensor]) -> Tensor:
    """y + scale · x lora_aᵀ lora_bᵀ, computed in the widest dtype of x and the adapter.

    The sum is rounded to x's dtype.  ``y`` None counts as zero.
    """
    lora_a, lora_b, scale = adapter
    scale, dtype = float(scale), x.dtype
    # A nested x isn't widened: the adapter's dense tensors are cast to x's dtype.
    if x.is_nested and y is not None:
        thin = linear(x, scale * lora_a.to(dtype))
        return y + linear(thin, lora_b.to(dtype))
    wide = torch.promote_types(dtype, torch.promote_types(lora_a.dtype, lora_b.dtype))
    thin = linear(x.to(wide), lora_a.to(wide))
    if y is None:
        return (linear(thin, lora_b.to(wide)) * scale).to(dtype)
    return torch.add(y, linear(thin, lora_b.to(wide)), alpha=scale).to(y.dtype)


def torch_dropout(p: float, rows: Rows | None = None) -> Drop:
    """torch's dropout with probability p; with many adapters, with each adapter's probability."""
    probabilities = None if rows is None or rows.numbers is None else rows.numbers.dropouts

    def drop(number: int, x: Tensor, share: Share | None) -> Tensor:
        own_p = p if probabilities is None or share is None else probabilities[share.segment]
        return dropout(x, own_p) if own_p else x

    return drop


def by_composite(inputs: Sequence[Tensor], seeds: Tensor | None, call: Call) -> tuple[Tensor, ...]:
    """Every output by the composite path, with the same dropout masks as the node."""
    x, *tensors = inputs

    def drop(number: int, x: Tensor, _: Share | None) -> Tensor:
        assert seeds is not None
        shape = math.prod(x.shape[:-1]), x.shape[-1]
        mask = call.backend.dropout_mask(seeds[number], shape, call.dropout).view(x.shape)
        return torch.where(mask, x / (1.0 - call.dropout), 0.0)

    return run_composite(x, unflatten(tensors, call.layouts), None if seeds is None else drop)


def by_autograd(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dys: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of each input, by autograd through the outputs of ``function(inputs)``.

    It is None if the input needs no gradient, or if no output depends on the input.  Used for
    gradients of gradients and for batched gradients.
    """
    create_graph, device = torch.is_grad_enabled(), inputs[0].device.type
    with torch.enable_grad(), autocast_off(device):
        # Views, because one tensor may be two inputs, and each input has its own gradient.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        ys = function(inputs)
    used = [i for i, dy in enumerate(dys) if dy is not None and ys[i].requires_grad]
    if not used:
        return [None] * len(inputs)
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    options = {"create_graph": create_graph, "allow_unused": True}
    used_ys, used_dys = [ys[i] for i in used], [dys[i] for i in used]
    with autocast_off(device):
        gradients = iter(torch.autograd.grad(used_ys, wanted, used_dys, **options))
    return [next(gradients) if need else None for need in needs]
