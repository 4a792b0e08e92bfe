"""The torch backend: any device and floating dtype, by torch's own products and in-place adds.

With x [M, K], weight [N, K], lora_a [r, K], lora_b [N, r] and the keep mask of dropout p:

    factor = scale / (1 - p)
    h  = factor · (mask ∘ x) lora_aᵀ            y  = x weightᵀ + h lora_bᵀ + bias
    dh = factor · dy lora_b                     dx = dy weight + mask ∘ (dh lora_a)
    d lora_a = dhᵀ (mask ∘ x)                   d lora_b = dyᵀ h

h and dh [M, r] carry the whole factor, multiplied in while the product is still in the accumulator,
so that nothing of size M·K or M·N is ever scaled.  Dropout runs over blocks of rows that stay in
cache: no dropped copy of x exists.
"""

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..blocks import rows_at_a_time
from ..projection import Adapter, Base, Output, flatten, per_adapter, unflatten
from .dropout import DropoutMask, dropout_mask, multiply_bits
from .protocol import Settings

__all__ = ["backward", "dropout_mask", "forward", "why_not"]


def why_not(dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]) -> str:
    """Why a call with x of this dtype and device isn't covered; it always is."""
    return ""


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, settings: Settings
) -> tuple[list[Tensor], list[Tensor]]:
    """y [M, N] of every output, and h [M, r] of every adapter, laid end to end."""
    x, *tensors = inputs
    outputs = unflatten(tensors, settings.layouts)
    ys, hs = [], []
    for (base, adapters), masks in zip(outputs, _masks(x, outputs, seeds, settings), strict=True):
        y = linear(x, base.weight, _cast(base.bias, x.dtype))
        for adapter, mask in zip(adapters, masks, strict=True):
            h = _project(x, adapter, mask)
            _add_product(y, h, _cast(adapter.lora_b, h.dtype).T)
            hs.append(_cast(h, x.dtype))
        ys.append(y)
    return ys, hs


def backward(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None."""
    x, *tensors = inputs
    needs_x, *needs_flat = needs
    outputs = unflatten(tensors, settings.layouts)
    output_needs = unflatten(needs_flat, settings.layouts)
    dx = _base_dx(dys, x, outputs) if needs_x else None
    gradients = []
    per_output = zip(
        dys,
        outputs,
        output_needs,
        per_adapter(hs, outputs),
        _masks(x, outputs, seeds, settings),
        strict=True,
    )
    for dy, output, need, thin, masks in per_output:
        if dy is None:
            gradients.append(no_gradients(output))
            continue
        base = base_gradients(dy, x, output.base, need.base)
        adapters = [
            _adapter_gradients(dy, x, *of_one, dx)
            for of_one in zip(output.adapters, need.adapters, thin, masks, strict=True)
        ]
        gradients.append(Output(base, tuple(adapters)))
    return [dx, *flatten(gradients, settings.layouts)]


def no_gradients(output: Output) -> Output[Tensor | None]:
    """Those of an output that the loss doesn't use."""
    return Output(Base(None), tuple([Adapter(None, None)] * len(output.adapters)))


def base_gradients(
    dy: Tensor, x: Tensor, base: Base[Tensor], need: Base[bool]
) -> Base[Tensor | None]:
    """dyᵀ x, and Σ dy over the rows in float32 or wider: of a weight and a bias that train."""
    d_weight = d_bias = None
    if need.weight:
        d_weight = torch.mm(dy.T, x)
    if need.bias and base.bias is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        d_bias = _cast(dy.sum(0, dtype=wide), base.bias.dtype)
    return Base(d_weight, d_bias)


def _adapter_gradients(
    dy: Tensor,
    x: Tensor,
    adapter: Adapter[Tensor],
    need: Adapter[bool],
    h: Tensor,
    mask: DropoutMask | None,
    dx: Tensor | None,
) -> Adapter[Tensor | None]:
    """d lora_a and d lora_b, as needed; and the adapter's part of dx is added to it."""
    dtype = _adapter_dtype(x, adapter)
    dy = _cast(dy, dtype)
    d_lora_a = d_lora_b = None
    if need.lora_a or dx is not None:
        dh = _product(dy, _cast(adapter.lora_b, dtype), _factor(adapter, mask))
        d_lora_a = _through_lora_a(_cast(x, dtype), dh, adapter.lora_a, mask, dx, need.lora_a)
    if need.lora_b:
        d_lora_b = _cast(_d_lora_b(dy, _cast(h, dtype)), adapter.lora_b.dtype)
    return Adapter(d_lora_a, d_lora_b)


def _masks(
    x: Tensor, outputs: Sequence[Output], seeds: Tensor | None, settings: Settings
) -> Iterator[Sequence[DropoutMask | None]]:
    """For each output its adapters' masks, or None for each without dropout."""
    if seeds is None:
        return ([None] * len(output.adapters) for output in outputs)
    masks = [DropoutMask(seed.view(1), x.shape[1], settings.dropout) for seed in seeds.unbind()]
    return per_adapter(masks, outputs)


def _adapter_dtype(x: Tensor, adapter: Adapter[Tensor]) -> torch.dtype:
    """The dtype of the adapter's products: x's.

    But where x has no more rows than a wider adapter (decoding), x is the cheaper one to convert:
    on 2 cores, a bfloat16 layer of 1024 x 1024 takes 0.8 of the time so at 1 row, as much at 16.
    """
    lora_a = adapter.lora_a
    if lora_a.dtype == x.dtype or len(x) > len(lora_a):
        return x.dtype
    wider = lora_a.element_size() > x.element_size() and lora_a.dtype == adapter.lora_b.dtype
    return lora_a.dtype if wider else x.dtype


def _factor(adapter: Adapter, mask: DropoutMask | None) -> float:
    scale = float(adapter.scale)
    return scale if mask is None else scale / (1.0 - mask.p)


def _project(x: Tensor, adapter: Adapter[Tensor], mask: DropoutMask | None) -> Tensor:
    """h = factor · (mask ∘ x) lora_aᵀ, [M, r], in the dtype of the adapter's products."""
    x = _cast(x, _adapter_dtype(x, adapter))
    down, factor = _cast(adapter.lora_a, x.dtype).T, _factor(adapter, mask)
    if mask is None:
        return _product(x, down, factor)
    h = x.new_empty(x.shape[0], down.shape[1])
    for first, x_rows, h_rows in _blocks(x, h):
        _product(multiply_bits(x_rows, mask.rows(first, len(x_rows))), down, factor, out=h_rows)
    return h


def _base_dx(dys: Sequence[Tensor | None], x: Tensor, outputs: Sequence[Output[Tensor]]) -> Tensor:
    """Σ dy weight over the outputs, [M, K]."""
    dx = None
    for dy, output in zip(dys, outputs, strict=True):
        if dy is not None:
            weight = output.base.weight
            dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
    return x.new_zeros(x.shape) if dx is None else dx


def _through_lora_a(
    x: Tensor,
    dh: Tensor,
    lora_a: Tensor,
    mask: DropoutMask | None,
    dx: Tensor | None,
    need_a: bool,
) -> Tensor | None:
    """Add mask ∘ (dh lora_a) onto dx, if there is one; return dhᵀ (mask ∘ x), if it is needed."""
    up = _cast(lora_a, x.dtype)
    if mask is None:
        if dx is not None:
            _add_product(dx, dh, up)
        return _cast(torch.mm(dh.T, x), lora_a.dtype) if need_a else None
    d_lora_a = None
    wide = torch.promote_types(x.dtype, torch.float32)  # of the sum over blocks
    for first, x_rows, dh_rows, dx_rows in _blocks(x, dh, dx):
        keep = mask.rows(first, len(x_rows))
        if need_a:
            part = torch.mm(dh_rows.T, multiply_bits(x_rows, keep))
            d_lora_a = part if d_lora_a is None else d_lora_a + part.to(wide)
        if dx is not None:
            dx_rows.add_(multiply_bits(torch.mm(dh_rows, up), keep))
    return _cast(d_lora_a, lora_a.dtype)


def _d_lora_b(dy: Tensor, h: Tensor) -> Tensor:
    """dyᵀ h, [N, r]."""
    if len(h) >= 256 and h.dtype == torch.float32:
        # Over many rows (hᵀ dy)ᵀ is up to twice as fast on some CPUs, and worth the copy.
        return torch.mm(h.T, dy).T.contiguous()
    return torch.mm(dy.T, h)


def _blocks(x: Tensor, *others: Tensor | None) -> Iterator[tuple]:
    """The first row of each block of dropout, and that block's rows of every tensor."""
    step = rows_at_a_time(x)
    if len(x) <= step:
        yield 0, x, *others
        return
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        yield first, x[rows], *(None if tensor is None else tensor[rows] for tensor in others)


def _product(left: Tensor, right: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """factor · left right, scaled in the accumulator, before the product is rounded."""
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left right, in place."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.add_(torch.mm(left, right))


@overload
def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _cast(tensor: None, dtype: torch.dtype) -> None: ...
def _cast(tensor, dtype):
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
