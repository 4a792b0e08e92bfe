"""The composite path: the formula by torch's own operations.

It supports all modes and transforms of torch, and is the reference for second-order gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ..backends.products import cast
from ..call.projection import Adapter, Output
from ..call.rows import Rows, Share, take
from ..formats.format import Quantized

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
    shapes = [output.base.weight.shape[-2] for output in outputs]
    if rows.shares_base:
        ys = list(_of_rows(matrix, [Output(output.base) for output in outputs], drop, None))
    else:
        ys = [matrix.new_zeros(len(matrix), width) for width in shapes]
    numbers = torch.arange(len(matrix), dtype=torch.int64, device=x.device)
    for share in rows.shares_of(len(matrix)) if len(matrix) else ():
        at = take(numbers.unsqueeze(1), share, items).flatten()  # the segment's row numbers
        parts = [rows.part(output, share.segment) for output in outputs]
        added = _of_rows(matrix[at], parts, drop, share)
        ys = [y.index_add(0, at, more) for y, more in zip(ys, added, strict=True)]
    return tuple([y.reshape(*x.shape[:-1], n) for y, n in zip(ys, shapes, strict=True)])


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
