"""Numbers of each row of a head's logits, without logits: the target's logit, and reductions."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.loss import reduced_rows
from .loss import Head
from .node import Function, as_matrix, once_differentiable


def reduced(head: Head, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """``reduce`` of blocks of logits [rows, V], with a number for each row: [M].  No gradient."""
    with torch.no_grad():
        return reduced_rows(as_matrix(head.x), head.output, head.masks(), reduce)


def with_gradient(z: Tensor, head: Head, target: Tensor) -> Tensor:
    """z [...], the logit of each row's target, with its place in autograd's graph.

    The head's weight isn't packed.
    """
    return _GradientOfFunction.apply(z, _target_logit(head, target))


def _target_logit(head: Head, target: Tensor) -> Tensor:
    """The same by torch's operations, from one row of the weight for each row of x."""
    x, ((weight, bias), adapters) = head.x, head.output
    z = (x * weight[target]).sum(-1)
    if bias is not None:
        z = z + bias[target]
    for adapter, mask in zip(adapters, head.masks(), strict=True):
        kept = x
        if mask is not None:
            keep = mask.rows(0, target.numel()).view(x.shape)
            kept = torch.where(keep, x / (1.0 - head.dropout), 0.0)
        thin = kept.to(adapter.lora_a.dtype) @ adapter.lora_a.T
        z = z + adapter.scale * (thin * adapter.lora_b[target]).sum(-1)
    return z


class _GradientOfFunction(Function):
    """Returns ``value``, and passes its gradient to ``source``, which differs only by rounding."""

    @staticmethod
    def forward(ctx, value: Tensor, source: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.to(ctx.dtype)
