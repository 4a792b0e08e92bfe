"""DoRA: a LoRA layer whose merged weight has rows of a trained length (docs/maths.md).

The formulas are those of Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv
2402.09353), with dropout as PEFT has it: on all that the magnitude changes.

    n    = ‖weight + scale · lora_b lora_a‖, a number for each row; no gradient flows through it
    gain = magnitude / n
    z    = xd weightᵀ + scale · xd lora_aᵀ lora_bᵀ              xd = drop(x)
    y    = gain ∘ z + (x - xd) weightᵀ + bias

Without dropout, xd is x and the product of the difference falls away.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..blocks import rows_at_a_time
from ..formats.format import Quantized
from ..projection import Base, Output
from .functional import lora_linear, lora_linears
from .node import are_batched
from .norm import norm_of_rows, wide_dtype


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    drop: Callable[[Tensor], Tensor] | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """y of the module's formulas, [..., N].

    Shapes, dtypes and errors are those of :func:`lora_linear`; magnitude and ``norm`` are [N] of
    any floating dtype.  ``drop`` makes xd of x; None is no dropout.  ``norm`` is n, where it is
    known (:func:`dora_norm`).  For the backward x is kept, or xd and what ``drop`` keeps, and z,
    and the h of a LoRA layer.  Raises ValueError for a magnitude or norm of another shape too.
    """
    for name, vector in (("magnitude", magnitude), ("norm", norm)):
        if vector is not None and vector.shape != weight.shape[:1]:
            expected = f"[{weight.shape[0]}], a number for each row of the weight"
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, but must be {expected}")
    if norm is None:
        norm = dora_norm(weight, lora_a, lora_b, scale)
    gain = magnitude / norm
    if drop is None:
        z = lora_linear(x, weight, lora_a, lora_b, bias=bias, scale=scale)
        return GainFunction.apply(z, gain, bias)
    dropped = drop(x)
    y = GainFunction.apply(lora_linear(dropped, weight, lora_a, lora_b, scale=scale), gain, None)
    return y + lora_linears(x - dropped, [Output(Base(weight, bias))])[0]


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """n of the module's formulas, [N], in float32 or wider, without a gradient."""
    if torch.compiler.is_compiling():
        if isinstance(weight, Quantized):
            tensors, text = list(weight.tensors), weight.format.text
        else:
            tensors, text = [weight.detach()], ""
        op = torch.ops.fastlora.dora_norm
        return op(tensors, lora_a.detach(), lora_b.detach(), scale, text)
    return norm_of_rows(weight, lora_a, lora_b, scale)


class GainFunction(torch.autograd.Function):
    """gain ∘ (z - bias) + bias for z [..., N] and gain and bias [N], in z's dtype.

    Where the gain is 1, it is z to the last bit.  It keeps z, if the gain trains.
    """

    @staticmethod
    def forward(ctx, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, gain, bias)
        return _multiply(z, gain, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        z, gain, bias = ctx.saved_tensors
        needs_z, needs_gain, needs_bias = ctx.needs_input_grad
        dz = _multiply(dy, gain) if needs_z else None
        d_gain = _sum_of_products(dy, z) if needs_gain else None
        d_bias = None
        if bias is not None and (needs_gain or needs_bias):
            sum_dy = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide_dtype(dy))
            if d_gain is not None:
                d_gain = d_gain - bias * sum_dy
            if needs_bias:
                d_bias = ((1.0 - gain) * sum_dy).to(bias.dtype)
        return dz, None if d_gain is None else d_gain.to(gain.dtype), d_bias


def _multiply(z: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """gain ∘ (z - bias) + bias, rounded to z's dtype once."""
    shift = None if bias is None else (1.0 - gain) * bias
    if _is_followed(z):
        return (z * gain if shift is None else torch.addcmul(shift, z, gain)).to(z.dtype)
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    step, rows = rows_at_a_time(z), (-1, z.shape[-1])
    for z_rows, y_rows in zip(z.reshape(rows).split(step), y.view(rows).split(step), strict=True):
        if shift is None:
            torch.mul(z_rows, gain, out=y_rows)
        else:
            torch.addcmul(shift, z_rows, gain, out=y_rows)
    return y


def _sum_of_products(dy: Tensor, z: Tensor) -> Tensor:
    """Σ dy ∘ z over all rows: [N], in float32 or wider."""
    dy, z, wide = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1]), wide_dtype(z)
    if _is_followed(dy):
        return (dy.to(wide) * z.to(wide)).sum(0)
    total = z.new_zeros(z.shape[1], dtype=wide)
    step = rows_at_a_time(z)
    for dy_rows, z_rows in zip(dy.split(step), z.split(step), strict=True):
        total += (dy_rows.to(wide) * z_rows).sum(0)
    return total


def _is_followed(tensor: Tensor) -> bool:
    """Whether something follows what is done with it: nothing may be written into a buffer."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or are_batched([tensor])
