"""DoRA: a LoRA layer whose merged weight has rows of a trained length.

The formulas are those of Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv
2402.09353), with dropout as PEFT has it: on all that the magnitude changes.

    n    = ‖weight + scale · lora_b lora_a‖, a number for each row, no gradient flows through it
    gain = magnitude / n
    z    = xd weightᵀ + scale · xd lora_aᵀ lora_bᵀ              xd = drop(x)
    y    = gain ∘ z + (x - xd) weightᵀ + bias

Without dropout, xd is x and the product of the difference falls away.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from .functional import lora_linear
from .library import are_batched, dora_norm

_BLOCK = 2**20  # elements that are multiplied in float32 at a time: they stay in cache


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: Callable[[Tensor], Tensor] | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """y of the module's formulas; shapes and dtypes are those of :func:`lora_linear`.

    magnitude [N].  ``dropout`` makes xd of x; None is none.  ``norm`` is n [N], if it is known
    (:func:`dora_norm`).  For the backward z is kept, and xd or x, and the h of a LoRA layer.
    """
    if norm is None:
        norm = dora_norm(weight, lora_a, lora_b, scale)
    gain = magnitude / norm
    dropped = x if dropout is None else dropout(x)
    y = ColumnGainFunction.apply(lora_linear(dropped, weight, lora_a, lora_b, scale=scale), gain)
    if dropout is not None:
        return y + linear(x - dropped, weight, bias)
    return y if bias is None else y.add_(bias.to(y.dtype))


class ColumnGainFunction(torch.autograd.Function):
    """gain ∘ z for z [..., N] and gain [N], in z's dtype; it keeps both, and nothing wider."""

    @staticmethod
    def forward(ctx, z: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(z, gain)
        return _multiply(z, gain)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, gain = ctx.saved_tensors
        dz = _multiply(dy, gain) if ctx.needs_input_grad[0] else None
        d_gain = _sum_of_products(dy, z).to(gain.dtype) if ctx.needs_input_grad[1] else None
        return dz, d_gain


def _multiply(z: Tensor, gain: Tensor) -> Tensor:
    """gain ∘ z.  In 16 bits as z + (gain - 1) ∘ z: of a gain near 1, the difference is exact."""
    if z.element_size() > 2:
        return z * gain.to(z.dtype)
    return torch.addcmul(z, z, (gain - 1.0).to(z.dtype))


def _sum_of_products(dy: Tensor, z: Tensor) -> Tensor:
    """Σ dy ∘ z over all rows: [N], in float32 or wider."""
    dy, z = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])
    wide = torch.promote_types(z.dtype, torch.float32)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or are_batched([dy]):
        return (dy.to(wide) * z.to(wide)).sum(0)
    total = z.new_zeros(z.shape[1], dtype=wide)
    step = max(1, _BLOCK // z.shape[1])
    for first in range(0, len(z), step):
        rows = slice(first, first + step)
        total += (dy[rows].to(wide) * z[rows]).sum(0)
    return total
