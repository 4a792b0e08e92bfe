"""Numbers of each row of a head's logits, without logits: the target's logit, and reductions.

With s the logits after scale and softcap, and t the target of a row, its loss is lse - s_t.  So one
pass of :func:`.loss.head_loss` gives s_t and lse = loss + s_t.  TRL's ``selective_log_softmax``
subtracts them, which gives the loss again, with its precision and its gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.loss import reduced_rows
from ..backends.protocol import LossSettings
from .loss import NO_INDEX, Head, head_loss
from .node import Function, as_matrix, once_differentiable


def loss_and_target_logit(
    head: Head, target: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Each row's loss, and z_t, its target's logit before scale and softcap.  Differentiable.

    The head's weight isn't packed.
    """
    z = head.x.new_empty(target.numel())
    loss = head_loss(head, target, settings, "none", NO_INDEX, of_target=z)
    z = z.view(target.shape)
    if not loss.requires_grad:
        return loss, z
    return loss, _GradientOfFunction.apply(z, _target_logit(head, target))


def reduced(head: Head, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """``reduce`` of the logits' blocks [rows, V], with a number for each row: [...].  No gradient.

    No tensor of the logits' size exists.
    """
    with torch.no_grad():
        found = reduced_rows(as_matrix(head.x), head.output, head.masks(), reduce)
    return found.view(head.x.shape[:-1])


def _target_logit(head: Head, target: Tensor) -> Tensor:
    """z_t by torch's operations, from one row of the weight for each row of x."""
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
    """Returns ``value``, and passes its gradient to ``source``, an equal tensor but for rounding."""

    @staticmethod
    def forward(ctx, value: Tensor, source: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.to(ctx.dtype)
