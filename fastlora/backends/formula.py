"""The formulas of :mod:`.torch` over some rows: the rows of a whole call, or of one segment.

A call is *wide* where this CPU multiplies its 16-bit dtype slowly (:mod:`.products`): an outer loop
copies a block of rows to float32, runs the same formulas on the copy, and rounds each result once.
D is the dtype of x:

    tensor                   in other calls                     in a wide call (D has 16 bits)
    x, y, dy, dx             D                                  D; the copy of a block is float32
    weight                   D; a packed weight is unpacked     widened a block at a time
    lora_a, lora_b, bias     cast to D                          cast to float32
    h                        D, or float32 (``h_dtype``)        float32
    dh                       D                                  float32
    gradients of parameters  the parameter's dtype              summed in float32, rounded to the
                                                                parameter's dtype

Exception: if x has at most r rows and the adapter's dtype is wider than D, the adapter's products
run in the adapter's dtype instead of D (``_thin``).  "Thin" products have r rows or columns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.projection import Adapter, Base, Output, map_outputs, reads_x
from ..common import row_blocks as blocks
from ..formats.format import Quantized
from .dropout import DropoutMask
from .int8 import add_dy_in_8_bits, linear_in_8_bits, rounded
from .products import (
    Scratch,
    add_dy_weight,
    add_product,
    base_linear,
    h_dtype,
    product,
    rows_of,
    thin_gradient,
    wide_rows,
)

SCRATCH = Scratch()
# For each output, the mask of each of its adapters; None: no dropout.
Masks = Sequence[Sequence[DropoutMask | None]]


def forward_rows(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    masks: Masks,
    into: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """y [M, N] of every output, and h [M, r] of every adapter.

    For an output with a base:

        h = scale / (1 - p) · (mask ∘ x) lora_aᵀ        y = x weightᵀ + bias + Σ h lora_bᵀ

    With ``into``, each y is written to its tensor there.  An output without a base needs ``into``,
    and adds: y += Σ h lora_bᵀ.  ``dtype`` is the dtype of h, if the caller has computed it
    (``h_dtype``).
    """
    dtype = dtype or h_dtype(x.dtype, x.device)
    # A single row doesn't run wide, because torch's product of one row is fast on every CPU.
    if x.shape[0] > 1 and dtype != x.dtype:
        return _wide_forward(x, outputs, masks, into)
    if x.shape[0] == 1:
        # On a CPU torch 2.10 gives wrong products of a bfloat16 row whose elements lie apart.
        x = x.contiguous()
    ys, hs = _base_products(x, outputs, into), []
    for y, (_, adapters), own_masks in zip(ys, outputs, masks, strict=True):
        for adapter, mask in zip(adapters, own_masks, strict=True):
            thin_x, lora_a, lora_b, factor = _thin(x, adapter, mask)  # all three in one dtype
            h = _project(thin_x, lora_a, factor, mask)  # [M, r], in that dtype
            add_product(y, h, lora_b.T)  # [M, r] @ [r, N], added in y's accumulator if that is D
            hs.append(h.to(dtype))  # saved for backward
    return ys, hs


def _runs_in_8_bits(weight: Quantized, x: Tensor) -> bool:
    """Whether products of rows like x's with this weight run in 8 bits; never for float64."""
    return weight.format.product == "int8" and x.dtype != torch.float64


def _base_products(
    x: Tensor, outputs: Sequence[Output[Tensor]], into: Sequence[Tensor] | None
) -> list[Tensor]:
    """x weightᵀ + bias [M, N] of every output; without a base, its tensor in ``into``."""
    ys, x_in_8_bits = list[Any](), None
    for i, (base, _) in enumerate(outputs):
        y = None if into is None else into[i]
        if isinstance(base.weight, Quantized) and _runs_in_8_bits(base.weight, x):
            x_in_8_bits = x_in_8_bits or rounded(x)  # once for all outputs
            y = linear_in_8_bits(x_in_8_bits, base, x.dtype, y)
        elif base.weight is not None:
            y = base_linear(x, base, y)
        ys.append(y)
    return ys


def _wide_forward(
    x: Tensor, outputs: Sequence[Output[Tensor]], masks: Masks, into: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`forward_rows` in float32, one block of rows after another."""
    outputs, hs_of_blocks = [_in_float32(output) for output in outputs], []
    ys = list(into or [x.new_empty(len(x), base.weight.shape[0]) for base, _ in outputs])
    for rows in wide_rows(x, outputs):
        x_rows = SCRATCH.widen("x", rows_of(x, rows))  # float32, so the call below isn't wide
        for y, output, own_masks in zip(ys, outputs, from_row(masks, rows.start), strict=True):
            y_rows = rows_of(y, rows)
            y_float32 = SCRATCH.take("y", *y_rows.shape)
            if output.base.weight is None:  # forward_rows adds to y
                y_float32.copy_(y_rows)
            hs_of_blocks += forward_rows(x_rows, [output], [own_masks], [y_float32])[1]
            y_rows.copy_(y_float32)  # the only rounding to 16 bits
    # hs_of_blocks is [block 0: h of each adapter, block 1: …]: every count-th is one adapter's.
    count = sum(len(output.adapters) for output in outputs)
    return ys, [_joined(hs_of_blocks[i::count]) for i in range(count)]


class OutputBackward(NamedTuple):
    """One output in a backward: the gradient of its y, and everything its own gradients need."""

    dy: Tensor | None  # None: the loss doesn't use this output
    output: Output[Tensor]
    hs: Sequence[Tensor | None]  # one for each adapter; None if its lora_b needs no gradient
    wanted: Output[bool]  # which gradients are needed
    masks: Sequence[DropoutMask | None]  # one for each adapter


def backward_rows(
    x: Tensor,
    parts: Sequence[OutputBackward],
    dx: Tensor | None,
    beta: float = 0.0,
    dtype: torch.dtype | None = None,
) -> list[Output[Tensor | None]]:
    """The gradients of each output's tensors; and, in place, dx.  With dh = factor · dy lora_b:

        dx = beta · dx + Σ dy weight + Σ mask ∘ (dh lora_a)
        d lora_a = dhᵀ (mask ∘ x)       d lora_b = dyᵀ h       d weight = dyᵀ x       d bias = Σ dy

    factor is scale / (1 - p).  At least one dy isn't None.  dx is None if it isn't needed.  As in
    torch.addmm, beta 0 overwrites dx without reading it.  ``dtype`` as in :func:`forward_rows`.
    """
    if x.shape[0] == 1:  # as in the forward
        x = x.contiguous()
        parts = [p._replace(dy=None if p.dy is None else p.dy.contiguous()) for p in parts]
    if x.shape[0] and (dtype or h_dtype(x.dtype, x.device)) != x.dtype:
        return _wide_backward(x, parts, dx, beta)
    gradients: list[Output[Tensor | None]] = []
    # The order: dx = mask ∘ (dh lora_a) first, then dx += dy weight.  So the mask is applied in dx
    # itself, and addmm adds to dx in its accumulator.  In the other order, mask ∘ (dh lora_a) would
    # need a buffer, and one more pass to add it.
    for dy, output, hs, wanted, masks in parts:
        if dy is None:
            gradients.append(no_gradients(output))
            continue
        adapters = []
        for adapter_and_more in zip(output.adapters, wanted.adapters, hs, masks, strict=True):
            adapters.append(_adapter_gradients(dy, x, *adapter_and_more, dx, beta))
            beta = 1.0  # dx is written now, so all later terms add to it
        base: Base[Tensor | None] = Base(None)
        if any(wanted.base):
            base = base_gradients(dy, x, output.base, wanted.base)
        gradients.append(Output(base, tuple(adapters)))
    if dx is not None:
        _add_base_products(dx, parts, beta)
    return gradients


def _add_base_products(dx: Tensor, parts: Sequence[OutputBackward], beta: float) -> None:
    """dx = beta · dx + Σ dy weight, over the outputs that the loss uses."""
    dense, in_8_bits = list[tuple[Tensor, Any]](), list[tuple[Tensor, Any]]()
    for dy, ((weight, _), _), *_ in parts:
        if dy is not None and weight is not None:
            # Products of int8 codes need dy in int8 also, so they take a function of their own.
            is_int8 = isinstance(weight, Quantized) and _runs_in_8_bits(weight, dy)
            (in_8_bits if is_int8 else dense).append((dy, weight))
    if in_8_bits:
        add_dy_in_8_bits(dx, in_8_bits, beta)
        beta = 1.0
    for dy, weight in dense:
        add_dy_weight(dx, dy, weight, beta)  # [M, N] @ [N, K]
        beta = 1.0


def _wide_backward(
    x: Tensor, parts: Sequence[OutputBackward], dx: Tensor | None, beta: float
) -> list[Output[Tensor | None]]:
    """:func:`backward_rows` in float32; gradients of parameters are summed over blocks of rows."""
    in_float32 = [_in_float32(part.output) for part in parts]
    total = [no_gradients(part.output) for part in parts]
    is_read = reads_x([part.wanted for part in parts])
    for rows in wide_rows(x, in_float32):
        x_block = rows_of(x, rows)
        # Only d lora_a and d weight read x.  If neither is needed, the block is left uninitialized.
        x_rows = SCRATCH.widen("x", x_block) if is_read else SCRATCH.take("x", *x_block.shape)
        dx_rows, block_beta = None, beta
        if dx is not None:
            dx_rows = SCRATCH.take("dx", *x_block.shape)  # float32, over all outputs
            if beta:
                dx_rows.copy_(rows_of(dx, rows))
        for i, (dy, _, hs, wanted, masks) in enumerate(parts):
            if dy is None:
                continue
            dy_rows, h_rows = SCRATCH.widen("dy", rows_of(dy, rows)), [rows_of(h, rows) for h in hs]
            (own_masks,) = from_row([masks], rows.start)
            block = OutputBackward(dy_rows, in_float32[i], h_rows, wanted, own_masks)
            (part,) = backward_rows(x_rows, [block], dx_rows, block_beta)
            total[i] = added(total[i], part, torch.float32)  # d lora_a, d lora_b … of all blocks
            block_beta = 1.0
        if dx is not None and dx_rows is not None:
            rows_of(dx, rows).copy_(dx_rows)  # rounded once
    outputs = [part.output for part in parts]
    return [map_outputs(_in_dtype_of, *pair) for pair in zip(total, outputs, strict=True)]


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts, concatenated along their rows; no copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def added(
    total: Output[Tensor | None], part: Output[Tensor | None], dtype: torch.dtype
) -> Output[Tensor | None]:
    """total += part for each gradient; a total of None becomes the part, in this dtype."""

    def add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
        if total is None or part is None:
            return total if part is None else part.to(dtype)
        return total.add_(part)

    return map_outputs(add, total, part)


def _in_dtype_of(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """The gradient in the tensor's dtype."""
    return None if gradient is None or tensor is None else gradient.to(tensor.dtype)


def no_gradients(output: Output) -> Output[Tensor | None]:
    """The gradients of an output that the loss doesn't use: all None."""
    return Output(Base(None), tuple([Adapter(None, None)] * len(output.adapters)))


def base_gradients(
    dy: Tensor, x: Tensor, base: Base[Tensor], need: Base[bool]
) -> Base[Tensor | None]:
    """d weight = dyᵀ x [N, K] and d bias = Σ dy [N], summed over rows; each only if it is needed.

    d bias is summed in float32, or in float64 for a float64 x.
    """
    d_weight = torch.mm(dy.T, x) if need.weight else None
    d_bias = None
    if need.bias and base.bias is not None:
        sum_dtype = torch.promote_types(x.dtype, torch.float32)
        d_bias = dy.sum(0, dtype=sum_dtype).to(base.bias.dtype)
    return Base(d_weight, d_bias)


def _adapter_gradients(
    dy: Tensor,
    x: Tensor,
    adapter: Adapter[Tensor],
    need: Adapter[bool],
    h: Tensor | None,
    mask: DropoutMask | None,
    dx: Tensor | None,
    beta: float,
) -> Adapter[Tensor | None]:
    """d lora_a = dhᵀ (mask ∘ x) and d lora_b = dyᵀ h, each if needed, with dh = factor · dy lora_b.

    Also, if dx isn't None: dx = beta · dx + mask ∘ (dh lora_a).
    """
    d_lora_a = d_lora_b = None
    x, lora_a, lora_b, factor = _thin(x, adapter, mask)  # x may be wider than D from here on
    dy = dy.to(x.dtype)
    # Each gradient in its parameter's dtype: float32 for a float32 adapter beside a 16-bit x.
    if need.lora_b:
        assert h is not None
        # h includes the factor, so d lora_b needs none.
        d_lora_b = thin_gradient(dy, h.to(x.dtype)).to(adapter.lora_b.dtype)
    if need.lora_a or dx is not None:
        dh = product(dy, lora_b, factor)  # [M, N] @ [N, r]
        d_lora_a = _through_lora_a(x, dh, lora_a, mask, dx, need.lora_a, beta)
    return Adapter(None if d_lora_a is None else d_lora_a.to(adapter.lora_a.dtype), d_lora_b)


def _thin(
    x: Tensor, adapter: Adapter[Tensor], mask: DropoutMask | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(x, lora_a, lora_b, scale / (1 - p)), with all three in the dtype of the adapter's products.

    The dtype is x's.  Exception: if x has at most r rows, as in decoding, it is the wider of x's
    and the adapter's, because x is then the smaller tensor to cast.
    """
    # In decoding x has one row, and the adapter r rows of the same length.
    lora_a, lora_b, scale = adapter
    factor = float(scale) if mask is None else float(scale) / (1.0 - mask.p)
    if lora_a.dtype == lora_b.dtype == x.dtype:
        return x, lora_a, lora_b, factor
    if lora_a.dtype == lora_b.dtype and x.shape[0] <= lora_a.shape[0]:
        x = x.to(torch.promote_types(x.dtype, lora_a.dtype))
    return x, lora_a.to(x.dtype), lora_b.to(x.dtype), factor


def _project(x: Tensor, lora_a: Tensor, factor: float, mask: DropoutMask | None) -> Tensor:
    """h = factor · (mask ∘ x) lora_aᵀ, [M, r]."""
    if mask is None:
        return product(x, lora_a.T, factor)
    h = x.new_empty(x.shape[0], lora_a.shape[0])
    # ``factor`` includes dropout's 1 / (1 - p), so ``drop`` only zeroes elements.
    for first, x_rows, h_rows in _blocks(x, h):
        dropped = SCRATCH.matrix_like("dropped", x_rows)  # one block of mask ∘ x, never the whole
        mask.drop(first, (x_rows, dropped))
        product(dropped, lora_a.T, factor, out=h_rows)
    return h


def _through_lora_a(
    x: Tensor,
    dh: Tensor,
    lora_a: Tensor,
    mask: DropoutMask | None,
    dx: Tensor | None,
    need_a: bool,
    beta: float,
) -> Tensor | None:
    """dx = beta · dx + mask ∘ (dh lora_a), unless dx is None; and d lora_a = dhᵀ (mask ∘ x)."""
    if dx is not None and not beta and dx.dtype != x.dtype:
        dx.zero_()  # torch.mm can't write a product of another dtype to dx, so add it to zeros
        beta = 1.0
    # Without a mask, one product each.  With a mask, a block of rows at a time, so that mask ∘ x is
    # never in memory as a whole.
    if mask is None:
        if dx is not None and beta:
            add_product(dx, dh, lora_a)  # [M, r] @ [r, K]
        elif dx is not None:
            torch.mm(dh, lora_a, out=dx)
        return torch.mm(dh.T, x) if need_a else None
    d_lora_a = None
    sum_dtype = torch.promote_types(x.dtype, torch.float32)  # for the sum over blocks
    for first, x_rows, dh_rows, dx_rows in _blocks(x, dh, dx):
        pairs, dx_part, dropped = [], dx_rows, None
        if dx is not None:
            # beta 0: dx = mask ∘ (dh lora_a), computed in dx.  beta 1: compute it in a buffer, and
            # add the buffer to dx below.
            dx_part = SCRATCH.matrix_like("change", x_rows) if beta else dx_rows
            pairs.append((torch.mm(dh_rows, lora_a, out=dx_part), dx_part))
        if need_a:
            dropped = SCRATCH.matrix_like("dropped", x_rows)
            pairs.append((x_rows, dropped))
        mask.drop(first, *pairs)  # one call for dx's part and x, so the mask is computed once
        if dx_part is not dx_rows:
            dx_rows.add_(dx_part)
        if dropped is not None:
            part = torch.mm(dh_rows.T, dropped)
            # A single block keeps the product's dtype.  Several are summed in sum_dtype.
            d_lora_a = part if d_lora_a is None else d_lora_a + part.to(sum_dtype)
    return d_lora_a


def _blocks(x: Tensor, *others: Tensor | None) -> list[tuple]:
    """(first row, rows of x, rows of each other tensor or None) for each block of rows."""
    if x.numel() <= blocks.SMALLEST_BLOCK:  # skips the computation of a block's size
        return [(0, x, *others)]
    return [
        (rows.start, x[rows], *[rows_of(tensor, rows) for tensor in others])
        for rows in blocks.slices(len(x), blocks.rows_at_a_time(x))
    ]


def from_row(masks: Masks, first: int) -> Masks:
    """The masks of the rows from ``first`` on."""
    if first == 0:  # the common case, without a copy
        return masks
    rest = slice(first, None)
    return [[None if mask is None else mask.of_rows(rest) for mask in group] for group in masks]


def _in_float32(output: Output[Tensor]) -> Output[Tensor]:
    """The output with bias and adapters in float32.  The weight is widened when it is read."""
    (weight, bias), adapters = output
    return Output(
        Base(weight, None if bias is None else bias.float()),
        tuple([Adapter(a.float(), b.float(), scale) for a, b, scale in adapters]),
    )
