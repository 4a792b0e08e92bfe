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
    hs = [_project(x, projection, dropout, _seed_of(seed, i)) for i, projection in enumerate(projections)]
    ys = []
    for projection, h in zip(projections, hs, strict=True):
        y = linear(x, projection.weight, _cast(projection.bias, x.dtype))
        ys.append(y.addmm_(h, _cast(projection.lora_b, x.dtype).T))
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
    dx = _base_dx(dys, x, projections) if needs[0] else None
    gradients = [dx]
    for i, (dy, projection, h) in enumerate(zip(dys, projections, hs, strict=True)):
        need_weight, need_a, need_b, need_bias = needs[1 + 4 * i : 5 + 4 * i]
        if dy is None:
            gradients += [None] * 4
            continue
        d_weight = torch.mm(dy.T, x) if need_weight else None
        d_lora_a = d_lora_b = d_bias = None
        if need_a or dx is not None:
            factor = projection.scale / (1.0 - dropout)
            dh = _product(dy, _cast(projection.lora_b, x.dtype), factor, out=torch.empty_like(h))
            d_lora_a = _through_lora_a(x, dh, projection.lora_a, dropout, _seed_of(seed, i), dx, need_a)
        if need_b:
            d_lora_b = _d_lora_b(dy, h)
        if need_bias:
            d_bias = dy.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
        found = (d_weight, d_lora_a, d_lora_b, d_bias)
        gradients += [
            None if gradient is None else _cast(gradient, tensor.dtype)
            for gradient, tensor in zip(found, projection.tensors, strict=True)
        ]
    return gradients


def _project(x: Tensor, projection: Projection, dropout: float, seed: Tensor | None) -> Tensor:
    """h = factor · (mask ∘ x) lora_aᵀ, [M, r]."""
    down = _cast(projection.lora_a, x.dtype).T
    h = x.new_empty(x.shape[0], down.shape[1])
    factor = projection.scale / (1.0 - dropout)
    if dropout == 0.0:
        return _product(x, down, factor, out=h)
    mask = DropoutMask(seed, x.shape[1], dropout)
    for first, x_rows, h_rows in _blocks(x, h):
        _product(multiply_bits(x_rows, mask.rows(first, len(x_rows))), down, factor, out=h_rows)
    return h


def _base_dx(dys: Sequence[Tensor | None], x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """Σ dy weight over the projections, [M, K]."""
    dx = None
    for dy, projection in zip(dys, projections, strict=True):
        if dy is not None:
            dx = torch.mm(dy, projection.weight) if dx is None else dx.addmm_(dy, projection.weight)
    return x.new_zeros(x.shape) if dx is None else dx


def _through_lora_a(
    x: Tensor, dh: Tensor, lora_a: Tensor, dropout: float, seed: Tensor | None, dx: Tensor | None, need_a: bool
) -> Tensor | None:
    """Add mask ∘ (dh lora_a) onto dx, if there is one, and return d lora_a = dhᵀ (mask ∘ x), if it is needed."""
    up = _cast(lora_a, x.dtype)
    if dropout == 0.0:
        if dx is not None:
            dx.addmm_(dh, up)
        return torch.mm(dh.T, x) if need_a else None
    mask, d_lora_a = DropoutMask(seed, x.shape[1], dropout), None
    wide = torch.promote_types(x.dtype, torch.float32)
    for first, x_rows, dh_rows, dx_rows in _blocks(x, dh, dx):
        keep = mask.rows(first, len(x_rows))
        if need_a:
            part = torch.mm(dh_rows.T, multiply_bits(x_rows, keep))
            d_lora_a = part if d_lora_a is None else d_lora_a + part.to(wide)
        if dx is not None:
            dx_rows.add_(multiply_bits(torch.mm(dh_rows, up), keep))
    return d_lora_a


def _d_lora_b(dy: Tensor, h: Tensor) -> Tensor:
    """dyᵀ h, [N, r].  Over many rows of float32 (hᵀ dy)ᵀ is faster, up to twice on some CPUs: it is worth its copy."""
    if len(h) >= 256 and h.dtype == torch.float32:
        return torch.mm(h.T, dy).T.contiguous()
    return torch.mm(dy.T, h)


def _blocks(x: Tensor, *others: Tensor | None) -> Iterator[tuple]:
    """The first row of each block of dropout, and that block's rows of every tensor."""
    step = max(1, (_CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK) // x.shape[1])
    if len(x) <= step:
        yield 0, x, *others
        return
    for first in range(0, len(x), step):
        yield first, *(None if tensor is None else tensor[first : first + step] for tensor in (x, *others))


def _product(left: Tensor, right: Tensor, factor: float, *, out: Tensor) -> Tensor:
    """out = factor · left right, scaled in the accumulator, before the product is rounded."""
    return torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _seed_of(seed: Tensor | None, i: int) -> Tensor | None:
    return None if seed is None else seed[i : i + 1]
