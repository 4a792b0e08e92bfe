"""The torch backend: any device and floating dtype, by torch's own matrix products and in-place adds.

With x [M, K], weight [N, K], lora_a [r, K], lora_b [N, r] and the keep mask of dropout p:

    factor = scale / (1 - p)
    h  = factor · (mask ∘ x) lora_aᵀ            y  = x weightᵀ + h lora_bᵀ + bias
    dh = factor · dy lora_b                     dx = dy weight + mask ∘ (dh lora_a)
    d lora_a = dhᵀ (mask ∘ x)                   d lora_b = dyᵀ h

h and dh [M, r] carry the whole factor, multiplied in while the product is still in the accumulator, so that nothing
of size M·K or M·N is ever scaled.  Dropout runs over blocks of rows that stay in cache: no dropped copy of x exists.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..projection import Projection
from .dropout import DropoutMask, dropout_mask, multiply_bits

__all__ = ["backward", "dropout_mask", "forward"]

# Elements of x in one block of dropout.  On 2 cores with 1 MiB of L2 cache each, 2^20 took 0.84 ms for 4 Mi elements
# of bfloat16, 2^18 took 1.15 ms; where a launch costs more than memory does, blocks are larger.
_CPU_BLOCK, _DEVICE_BLOCK = 2**20, 2**24


def forward(
    x: Tensor, projections: Sequence[Projection], *, dropout: float, seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs [M, N] and the h [M, r] of all projections of x [M, K].  ``seed``: int64, one for each, if p > 0."""
    hs = [x.new_empty(x.shape[0], projection.lora_a.shape[0]) for projection in projections]
    downs = [projection.lora_a.to(x.dtype).T for projection in projections]  # [K, r]
    factors = [projection.scale / (1.0 - dropout) for projection in projections]
    if dropout == 0.0:
        for h, down, factor in zip(hs, downs, factors, strict=True):
            _product(x, down, factor, out=h)
    else:
        masks = [DropoutMask(seed[i], x.shape, dropout) for i in range(len(projections))]
        for rows in _row_blocks(x):
            kept = torch.empty_like(x[rows], memory_format=torch.contiguous_format)
            for h, down, factor, mask in zip(hs, downs, factors, masks, strict=True):
                multiply_bits(x[rows], mask.rows(rows), out=kept)
                _product(kept, down, factor, out=h[rows])
    ys = []
    for projection, h in zip(projections, hs, strict=True):
        y = linear(x, projection.weight, _cast(projection.bias, x.dtype))
        ys.append(y.addmm_(h, projection.lora_b.to(x.dtype).T))
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
    """The gradients of x and then of each projection's tensors, where ``needs`` (in that order) asks, else None.

    ``dys``: [M, N], or None for an output that the loss does not use.
    """
    gradients: list[Tensor | None] = [None] * len(needs)
    if needs[0]:
        gradients[0] = _base_dx(dys, x, projections)
    for i, (dy, projection, h) in enumerate(zip(dys, projections, hs, strict=True)):
        first = 1 + 4 * i
        need_weight, need_a, need_b, need_bias = needs[first : first + 4]
        if dy is None:
            continue
        if need_weight:
            gradients[first] = dy.T @ x
        if needs[0] or need_a:
            mask = DropoutMask(seed[i], x.shape, dropout) if dropout > 0.0 else None
            dh = x.new_empty(h.shape)
            _product(dy, projection.lora_b.to(x.dtype), projection.scale / (1.0 - dropout), out=dh)
            gradients[first + 1] = _through_lora_a(x, dh, projection.lora_a, mask, gradients[0], need_a)
        if need_b:  # hᵀ dy has the better orientation: in float32 it takes half the time of dyᵀ h on some CPUs
            gradients[first + 2] = (h.T @ dy).T.to(projection.lora_b.dtype).contiguous()
        if need_bias:
            gradients[first + 3] = dy.sum(0, dtype=torch.promote_types(projection.bias.dtype, torch.float32)).to(
                projection.bias.dtype
            )
    return gradients


def _base_dx(dys: Sequence[Tensor | None], x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """Σ dy weight over the projections, [M, K]."""
    dx = None
    for dy, projection in zip(dys, projections, strict=True):
        if dy is not None:
            dx = dy @ projection.weight if dx is None else dx.addmm_(dy, projection.weight)
    return x.new_zeros(x.shape) if dx is None else dx


def _through_lora_a(
    x: Tensor, dh: Tensor, lora_a: Tensor, mask: DropoutMask | None, dx: Tensor | None, need_a: bool
) -> Tensor | None:
    """Add mask ∘ (dh lora_a) onto dx, if there is one, and return d lora_a = dhᵀ (mask ∘ x), if it is needed."""
    up = lora_a.to(x.dtype)  # [r, K]
    if mask is None:
        if dx is not None:
            dx.addmm_(dh, up)
        return (dh.T @ x).to(lora_a.dtype) if need_a else None
    total = x.new_zeros(lora_a.shape, dtype=torch.promote_types(x.dtype, torch.float32)) if need_a else None
    for rows in _row_blocks(x):
        keep, masked = mask.rows(rows), None
        if total is not None:
            masked = torch.empty_like(x[rows], memory_format=torch.contiguous_format)
            multiply_bits(x[rows], keep, out=masked)
            total += dh[rows].T @ masked
        if dx is not None:
            masked = torch.mm(dh[rows], up, out=masked) if masked is not None else dh[rows] @ up
            dx[rows].add_(multiply_bits(masked, keep, out=masked))
    return None if total is None else total.to(lora_a.dtype)


def _product(left: Tensor, right: Tensor, factor: float, *, out: Tensor) -> None:
    """out = factor · left right, scaled in the accumulator, before the product is rounded."""
    torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _row_blocks(x: Tensor) -> Iterator[slice]:
    rows, columns = x.shape
    step = max(1, (_CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK) // columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
