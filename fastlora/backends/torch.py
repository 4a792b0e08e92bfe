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

from ..projection import Projection, outputs_of
from .dropout import DropoutMask, dropout_mask, multiply_bits

__all__ = ["backward", "dropout_mask", "forward", "why_not"]

# Elements in one block of dropout, or of what is made float32 for a while.  On 2 cores with 1 MiB
# of L2 cache each, dropout with 2^20 took 0.84 ms for 4 Mi elements of bfloat16, 2^18 took 1.15 ms;
# where a launch costs more than memory does, blocks are larger.
_CPU_BLOCK, _DEVICE_BLOCK = 2**20, 2**24


def why_not(dtype: torch.dtype, device: torch.device, projections: Sequence[Projection]) -> str:
    """Why a call with x of this dtype and device isn't covered; it always is."""
    return ""


def forward(
    x: Tensor, projections: Sequence[Projection], *, dropout: float, seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs [M, N] and the h [M, r] of all projections of x [M, K].

    There is an output for each weight: a projection without one adds to the output before it.
    ``seed``: int64 [number of projections], on x's device; None without dropout.
    """
    ys, hs = [], []
    for projection, mask in zip(projections, _masks(x, projections, dropout, seed), strict=True):
        dtype = _adapter_dtype(x, projection)
        h = _project(_cast(x, dtype), projection, mask)
        if projection.weight is not None:
            ys.append(linear(x, projection.weight, _cast(projection.bias, x.dtype)))
        _add_product(ys[-1], h, _cast(projection.lora_b, dtype).T)
        hs.append(_cast(h, x.dtype))
    return ys, hs


def backward(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    *,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of x and of each projection's tensors, or None where ``needs`` doesn't ask.

    ``needs`` has that order too.  ``dys``: for each output [M, N], or None if the loss doesn't use
    it.
    """
    dys = [dys[i] for i in outputs_of(projections)]
    dx = _base_dx(dys, x, projections) if needs[0] else None
    gradients = [dx]
    masks = _masks(x, projections, dropout, seed)
    for i, (dy, projection, h, mask) in enumerate(zip(dys, projections, hs, masks, strict=True)):
        need_weight, need_a, need_b, need_bias = needs[1 + 4 * i : 5 + 4 * i]
        d_weight = d_lora_a = d_lora_b = d_bias = None
        if dy is not None:
            if need_weight:
                d_weight = torch.mm(dy.T, x)
            if need_bias and projection.bias is not None:
                wide = torch.promote_types(x.dtype, torch.float32)
                d_bias = _cast(dy.sum(0, dtype=wide), projection.bias.dtype)
            dtype = _adapter_dtype(x, projection)
            dy = _cast(dy, dtype)
            if need_a or dx is not None:
                dh = _product(dy, _cast(projection.lora_b, dtype), _factor(projection, mask))
                lora_a = projection.lora_a
                d_lora_a = _through_lora_a(_cast(x, dtype), dh, lora_a, mask, dx, need_a)
            if need_b:
                d_lora_b = _cast(_d_lora_b(dy, _cast(h, dtype)), projection.lora_b.dtype)
        gradients += [d_weight, d_lora_a, d_lora_b, d_bias]
    return gradients


def _masks(
    x: Tensor, projections: Sequence[Projection], dropout: float, seed: Tensor | None
) -> Sequence[DropoutMask | None]:
    """A mask for each projection, or None for each without dropout."""
    if seed is None:
        return [None] * len(projections)
    return [DropoutMask(seed[i : i + 1], x.shape[1], dropout) for i in range(len(projections))]


def _adapter_dtype(x: Tensor, projection: Projection) -> torch.dtype:
    """The dtype of the adapter's products: x's.

    But where x has no more rows than a wider adapter (decoding), x is the cheaper one to convert:
    on 2 cores, a bfloat16 layer of 1024 x 1024 takes 0.8 of the time so at 1 row, as much at 16.
    """
    lora_a = projection.lora_a
    if lora_a.dtype == x.dtype or len(x) > len(lora_a):
        return x.dtype
    wider = lora_a.element_size() > x.element_size() and lora_a.dtype == projection.lora_b.dtype
    return lora_a.dtype if wider else x.dtype


def _factor(projection: Projection, mask: DropoutMask | None) -> float:
    scale = float(projection.scale)
    return scale if mask is None else scale / (1.0 - mask.p)


def _project(x: Tensor, projection: Projection, mask: DropoutMask | None) -> Tensor:
    """h = factor · (mask ∘ x) lora_aᵀ, [M, r]."""
    down, factor = _cast(projection.lora_a, x.dtype).T, _factor(projection, mask)
    if mask is None:
        return _product(x, down, factor)
    h = x.new_empty(x.shape[0], down.shape[1])
    for first, x_rows, h_rows in _blocks(x, h):
        _product(multiply_bits(x_rows, mask.rows(first, len(x_rows))), down, factor, out=h_rows)
    return h


def _base_dx(dys: Sequence[Tensor | None], x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """Σ dy weight over the projections, [M, K]."""
    dx = None
    for dy, projection in zip(dys, projections, strict=True):
        weight = projection.weight
        if dy is not None and weight is not None:
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


def rows_at_a_time(x: Tensor) -> int:
    """How many rows of x make a block: it stays in cache, or on a device it pays its launches."""
    return max(1, (_CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK) // x.shape[-1])


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
