"""The formulas of :mod:`.torch` over some rows: those of a whole call, or of one expert."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..blocks import rows_at_a_time
from ..projection import Adapter, Base, Output, per_adapter
from .bases import add_dy_weight, base_linear
from .dropout import DropoutMask
from .products import (
    SCRATCH,
    add_product,
    are_wide,
    cast,
    h_dtype,
    matrix_like,
    product,
    rows_of,
    thin_gradient,
    weight_gradient,
    wide_rows,
    widen_small,
    write_linear,
)
from .protocol import Settings

# For each output, what each of its adapters has.
_Masks = Sequence[Sequence[DropoutMask | None]]
_Gradients = list[list[Adapter[Tensor | None]]]


def forward_rows(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    masks: _Masks,
    into: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """y [M, N] of every output, new or written ``into`` these; the h [M, r] of every adapter."""
    dtype, ys, hs = x.dtype, [], []
    kept = h_dtype(dtype, x.device)
    # A wide call keeps a wide h; and torch's product of one row is fast everywhere.
    if kept != dtype and x.shape[0] > 1 and are_wide(x):
        return _wide_forward(x, outputs, masks, into)
    for i, ((base, adapters), some) in enumerate(zip(outputs, masks, strict=True)):
        y = base_linear(x, base, None if into is None else into[i])
        for adapter, mask in zip(adapters, some, strict=True):
            hs.append(cast(_add_adapter(y, x, adapter, mask), kept))
        ys.append(y)
    return ys, hs


def add_adapter(y: Tensor, x: Tensor, adapter: Adapter[Tensor], mask: DropoutMask | None) -> Tensor:
    """Add what an adapter makes of x onto y [M, N]; the h [M, r]."""
    if x.shape[0] == 1 or not are_wide(x):
        return _add_adapter(y, x, adapter, mask)
    wide, parts = _adapter_in_float32(adapter), []
    for rows in wide_rows(x):
        x_rows, rest = SCRATCH.widen("x", rows_of(x, rows)), _mask_from_row(mask, rows.start)
        parts.append(_add_adapter(rows_of(y, rows), x_rows, wide, rest))
    return _joined(parts)


def _add_adapter(
    y: Tensor, x: Tensor, adapter: Adapter[Tensor], mask: DropoutMask | None
) -> Tensor:
    h = _project(x, adapter, mask)
    add_product(y, h, cast(adapter.lora_b, h.dtype).T)
    return h


def _wide_forward(
    x: Tensor, outputs: Sequence[Output[Tensor]], masks: _Masks, into: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The same in float32, a block of rows after the other; each y is rounded once."""
    outputs = [_in_float32(output) for output in outputs]
    ys = _empty(x, outputs) if into is None else list(into)
    parts = []
    for rows in wide_rows(x):
        x_rows = SCRATCH.widen("x", rows_of(x, rows))
        for y, output, some in zip(ys, outputs, _from_row(masks, rows.start), strict=True):
            pairs = zip(output.adapters, some, strict=True)
            thin = [_project(x_rows, adapter, mask) for adapter, mask in pairs]
            write_linear(rows_of(y, rows), x_rows, output, thin)
            parts += thin
    count = sum(len(output.adapters) for output in outputs)
    return ys, [_joined(parts[i::count]) for i in range(count)]


def _empty(x: Tensor, outputs: Sequence[Output[Tensor]]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], output.base.weight.shape[0]) for output in outputs]


def backward_rows(
    dys: Sequence[Tensor | None],
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    hs: Sequence[Sequence[Tensor]],
    wanted: Sequence[Output[bool]],
    masks: _Masks,
    needs_x: bool,
    into: Tensor | None = None,
) -> tuple[Tensor | None, list[Output[Tensor | None]]]:
    """dx, if it is needed, new or written ``into`` this, and the gradients of each output.

    ``hs`` are lists of each output's.
    """
    of_adapters = _wide_adapter_gradients if are_wide(x) else _gradients_of_adapters
    dx, found = of_adapters(dys, x, outputs, hs, wanted, masks, needs_x, into)
    return dx, [
        no_gradients(output)
        if dy is None
        else Output(base_gradients(dy, x, output.base, need.base), tuple(adapters))
        for dy, output, need, adapters in zip(dys, outputs, wanted, found, strict=True)
    ]


def _gradients_of_adapters(
    dys: Sequence[Tensor | None],
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    hs: Sequence[Sequence[Tensor]],
    wanted: Sequence[Output[bool]],
    masks: _Masks,
    needs_x: bool,
    into: Tensor | None = None,
) -> tuple[Tensor | None, _Gradients]:
    """dx, if it is needed, and for each output its adapters' gradients, none without a dy."""
    dx = None
    if needs_x:
        dx = x.new_empty(x.shape) if into is None else into
    found: _Gradients = []
    # The first adapter's part is written into dx as it is, and the base's product added on top, in
    # its accumulator: a pass less than the other way round.
    beta = 0.0
    for dy, output, thin, need, some in zip(dys, outputs, hs, wanted, masks, strict=True):
        found.append([])
        if dy is None:
            continue
        for one in zip(output.adapters, need.adapters, thin, some, strict=True):
            found[-1].append(_adapter_gradients(dy, x, *one, dx, beta))
            beta = 1.0
    if dx is not None:
        _add_base_dx(dx, dys, outputs, beta)
    return dx, found


def _wide_adapter_gradients(
    dys: Sequence[Tensor | None],
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    hs: Sequence[Sequence[Tensor]],
    wanted: Sequence[Output[bool]],
    masks: _Masks,
    needs_x: bool,
    into: Tensor | None = None,
) -> tuple[Tensor | None, _Gradients]:
    """The same in float32, summed over blocks of rows."""
    dx = into
    if needs_x and dx is None:
        dx = x.new_empty(x.shape)
    wide = [_in_float32(output) for output in outputs]

    def of_block(rows: slice, x_rows: Tensor) -> _Gradients:
        part_dx, part = _gradients_of_adapters(
            widen_small([rows_of(dy, rows) for dy in dys]),
            x_rows,
            wide,
            [[rows_of(h, rows) for h in thin] for thin in hs],
            wanted,
            _from_row(masks, rows.start),
            needs_x,
            SCRATCH.take("dx", *x_rows.shape) if needs_x else None,
        )
        if dx is not None and part_dx is not None:
            rows_of(dx, rows).copy_(part_dx)
        return part

    reads_x = any(adapter.lora_a for output in wanted for adapter in output.adapters)
    total = _sum_over_blocks(x, reads_x, of_block)
    return dx, [
        [
            _in_own_dtype(found, adapter)
            for found, adapter in zip(of_output, output.adapters, strict=False)
        ]
        for of_output, output in zip(total, outputs, strict=True)
    ]


def _sum_over_blocks(
    x: Tensor, reads_x: bool, of_block: Callable[[slice, Tensor], _Gradients]
) -> _Gradients:
    """The gradients by all blocks of a wide x: which rows, and they in float32 if they are read."""
    total = None
    for rows in wide_rows(x):
        some = rows_of(x, rows)
        part = of_block(
            rows, SCRATCH.widen("x", some) if reads_x else SCRATCH.take("x", *some.shape)
        )
        total = part if total is None else _sum(total, part)
    assert total is not None  # a wide x has rows
    return total


def _joined(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """All rows, one part after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sum(total: _Gradients, part: _Gradients) -> _Gradients:
    """total + part, in place."""
    for of_output, more in zip(total, part, strict=True):
        for left, right in zip(of_output, more, strict=True):
            for gradient, other in zip(left[:2], right[:2], strict=True):
                if gradient is not None and other is not None:
                    gradient.add_(other)
    return total


def no_gradients(output: Output) -> Output[Tensor | None]:
    """Those of an output that the loss doesn't use."""
    return Output(Base(None), tuple([Adapter(None, None)] * len(output.adapters)))


def base_gradients(
    dy: Tensor, x: Tensor, base: Base[Tensor], need: Base[bool]
) -> Base[Tensor | None]:
    """dyᵀ x, and Σ dy over the rows in float32 or wider: of a weight and a bias that train."""
    d_weight = d_bias = None
    if need.weight:
        d_weight = weight_gradient(dy, x)
    if need.bias and base.bias is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        d_bias = cast(dy.sum(0, dtype=wide), base.bias.dtype)
    return Base(d_weight, d_bias)


def adapter_gradients(
    dy: Tensor,
    x: Tensor,
    adapter: Adapter[Tensor],
    need: Adapter[bool],
    h: Tensor,
    mask: DropoutMask | None,
    dx: Tensor | None,
) -> Adapter[Tensor | None]:
    """d lora_a and d lora_b, as needed; and the adapter's part of dx is added to it."""
    if not are_wide(x):
        return _adapter_gradients(dy, x, adapter, need, h, mask, dx)
    wide = _adapter_in_float32(adapter)

    def of_block(rows: slice, x_rows: Tensor) -> _Gradients:
        (dy_rows,), rest = widen_small([rows_of(dy, rows)]), _mask_from_row(mask, rows.start)
        assert dy_rows is not None
        some = rows_of(h, rows), rest, rows_of(dx, rows)
        return [[_adapter_gradients(dy_rows, x_rows, wide, need, *some)]]

    ((found,),) = _sum_over_blocks(x, need.lora_a, of_block)
    return _in_own_dtype(found, adapter)


def _in_own_dtype(
    found: Adapter[Tensor | None], adapter: Adapter[Tensor]
) -> Adapter[Tensor | None]:
    return Adapter(
        cast(found.lora_a, adapter.lora_a.dtype), cast(found.lora_b, adapter.lora_b.dtype)
    )


def _adapter_gradients(
    dy: Tensor,
    x: Tensor,
    adapter: Adapter[Tensor],
    need: Adapter[bool],
    h: Tensor,
    mask: DropoutMask | None,
    dx: Tensor | None,
    beta: float = 1.0,
) -> Adapter[Tensor | None]:
    """As :func:`adapter_gradients`; with ``beta`` 0 dx is written over, and not added to."""
    dtype = _adapter_dtype(x, adapter)
    lora_b = cast(adapter.lora_b, dtype) if need.lora_a or dx is not None else None
    own_h = cast(h, dtype) if need.lora_b else None
    dh, d_lora_b = _through_lora_b(dy, lora_b, own_h, factor_of(adapter, mask), dtype)
    d_lora_a = None
    if dh is not None:
        d_lora_a = _through_lora_a(cast(x, dtype), dh, adapter.lora_a, mask, dx, need.lora_a, beta)
    return Adapter(d_lora_a, cast(d_lora_b, adapter.lora_b.dtype))


def _through_lora_b(
    dy: Tensor, lora_b: Tensor | None, h: Tensor | None, factor: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """dh = factor · dy lora_b and dyᵀ h, each if the other side of it is there, in ``dtype``."""
    if dy.dtype != dtype and are_wide(dy):
        parts = [
            _through_lora_b(
                SCRATCH.widen("part", rows_of(dy, rows)), lora_b, rows_of(h, rows), factor, dtype
            )
            for rows in wide_rows(dy, fewest=1)
        ]
        dhs, gradients = zip(*parts, strict=True)
        dh = None if lora_b is None else _joined(dhs)
        return dh, None if h is None else sum(gradients[1:], gradients[0])
    dy = cast(dy, dtype)
    dh = None if lora_b is None else product(dy, lora_b, factor)
    return dh, None if h is None else thin_gradient(dy, h)


def masks_of(
    x: Tensor, outputs: Sequence[Output], seeds: Tensor | None, settings: Settings
) -> _Masks:
    """For each output its adapters' masks, or None for each without dropout."""
    if seeds is None:
        return [[None] * len(output.adapters) for output in outputs]
    masks = [DropoutMask(seed.view(1), x.shape, settings.dropout) for seed in seeds.unbind()]
    return list(per_adapter(masks, outputs))


def _from_row(masks: _Masks, first: int) -> _Masks:
    if first == 0:
        return masks
    return [[_mask_from_row(mask, first) for mask in some] for some in masks]


def _mask_from_row(mask: DropoutMask | None, first: int) -> DropoutMask | None:
    return None if mask is None else mask.from_row(first)


def _in_float32(output: Output[Tensor]) -> Output[Tensor]:
    """With its adapters in float32; weight and bias are widened as they are read."""
    return Output(output.base, tuple([_adapter_in_float32(each) for each in output.adapters]))


def _adapter_in_float32(adapter: Adapter[Tensor]) -> Adapter[Tensor]:
    lora_a, lora_b, scale = adapter
    if lora_a.dtype == lora_b.dtype == torch.float32:
        return adapter
    return Adapter(lora_a.float(), lora_b.float(), scale)


def _adapter_dtype(x: Tensor, adapter: Adapter[Tensor]) -> torch.dtype:
    """The dtype of the adapter's products: x's.

    But where x has no more rows than a wider adapter (decoding), x is the cheaper one to convert:
    on 2 cores, a bfloat16 layer of 1024 x 1024 takes 0.8 of the time so at 1 row, as much at 16.
    """
    lora_a = adapter.lora_a
    if lora_a.dtype == x.dtype or x.shape[0] > lora_a.shape[0]:
        return x.dtype
    wider = lora_a.element_size() > x.element_size() and lora_a.dtype == adapter.lora_b.dtype
    return lora_a.dtype if wider else x.dtype


def factor_of(adapter: Adapter, mask: DropoutMask | None) -> float:
    scale = float(adapter.scale)
    return scale if mask is None else scale / (1.0 - mask.p)


def _project(x: Tensor, adapter: Adapter[Tensor], mask: DropoutMask | None) -> Tensor:
    """h = factor · (mask ∘ x) lora_aᵀ, [M, r], in the dtype of the adapter's products."""
    x = cast(x, _adapter_dtype(x, adapter))
    down, factor = cast(adapter.lora_a, x.dtype).T, factor_of(adapter, mask)
    if mask is None:
        return product(x, down, factor)
    h = x.new_empty(x.shape[0], down.shape[1])
    for first, x_rows, h_rows in _blocks(x, h):
        dropped = matrix_like("dropped", x_rows)
        mask.drop(first, (x_rows, dropped))
        product(dropped, down, factor, out=h_rows)
    return h


def _add_base_dx(
    dx: Tensor, dys: Sequence[Tensor | None], outputs: Sequence[Output[Tensor]], beta: float
) -> None:
    """dx = beta · dx + Σ dy weight over the outputs."""
    for dy, output in zip(dys, outputs, strict=True):
        if dy is not None:
            add_dy_weight(dx, dy, output.base.weight, beta)
            beta = 1.0
    if not beta:
        dx.zero_()


def _through_lora_a(
    x: Tensor,
    dh: Tensor,
    lora_a: Tensor,
    mask: DropoutMask | None,
    dx: Tensor | None,
    need_a: bool,
    beta: float,
) -> Tensor | None:
    """dx = beta · dx + mask ∘ (dh lora_a), if there is one; dhᵀ (mask ∘ x), if it is needed."""
    up = cast(lora_a, x.dtype)
    if dx is not None and not beta and dx.dtype != x.dtype:  # a product can't be written into it
        dx.zero_()
        beta = 1.0
    if mask is None:
        if dx is not None and beta:
            add_product(dx, dh, up)
        elif dx is not None:
            torch.mm(dh, up, out=dx)
        return cast(torch.mm(dh.T, x), lora_a.dtype) if need_a else None
    d_lora_a = None
    wide = torch.promote_types(x.dtype, torch.float32)  # of the sum over blocks
    for first, x_rows, dh_rows, dx_rows in _blocks(x, dh, dx):
        pairs, change, dropped = [], dx_rows, None
        if dx is not None:
            change = matrix_like("change", x_rows) if beta else dx_rows
            pairs.append((torch.mm(dh_rows, up, out=change), change))
        if need_a:
            dropped = matrix_like("dropped", x_rows)
            pairs.append((x_rows, dropped))
        mask.drop(first, *pairs)
        if change is not dx_rows:
            dx_rows.add_(change)
        if dropped is not None:
            part = torch.mm(dh_rows.T, dropped)
            d_lora_a = part if d_lora_a is None else d_lora_a + part.to(wide)
    return cast(d_lora_a, lora_a.dtype)


def _blocks(x: Tensor, *others: Tensor | None) -> Iterator[tuple]:
    """The first row of each block of dropout, and that block's rows of every tensor."""
    step = rows_at_a_time(x)
    if x.shape[0] <= step:
        yield 0, x, *others
        return
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        yield first, x[rows], *(None if tensor is None else tensor[rows] for tensor in others)
