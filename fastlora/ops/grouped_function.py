"""The autograd node of a call with experts, for eager calls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import Settings
from ..projection import unflatten
from ..segments import Segments
from .call import are_batched, gradients_of, kept, run_grouped, run_grouped_backward, stand_in
from .function import unread

_ARGUMENTS = 3  # seeds, settings and offsets, before the inputs


class LoRAGroupedFunction(torch.autograd.Function):
    """One node for all experts.  It saves the inputs, the offsets, the seed and h.

    x is left out if neither lora_a nor weight needs a gradient, h if lora_b needs none.
    """

    @staticmethod
    def forward(
        ctx, seeds: Tensor | None, settings: Settings, ends: Tensor, *inputs: Tensor
    ) -> Tensor:
        """``inputs``: x, and the output's tensors, laid flat: what autograd follows."""
        y, h = run_grouped(inputs, Segments(ends), seeds, settings)
        x, *tensors = inputs
        kept_x, kept_h = kept(x, [h], ctx.needs_input_grad[_ARGUMENTS:], settings.layouts)
        ctx.save_for_backward(seeds, ends, kept_x, *tensors, *kept_h)
        ctx.settings, ctx.shape, ctx.dtype = settings, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, needs = ctx.settings, ctx.needs_input_grad[_ARGUMENTS:]
        if dy is None:
            return (None,) * (_ARGUMENTS + len(needs))
        seeds, ends, x, *tensors, h = ctx.saved_tensors
        segments, has_x = Segments(ends), x is not None
        if not has_x:
            x = stand_in(tensors[0], ctx.shape, ctx.dtype)
        if torch.is_grad_enabled() or are_batched([dy]):
            if not has_x:
                x = unread(x, needs[0], [h])
            gradients = _differentiable(dy, [x, *tensors], segments, needs, seeds, settings)
        else:
            h = x.new_empty(len(x), 0) if h is None else h
            gradients = run_grouped_backward(dy, [x, *tensors], segments, h, needs, seeds, settings)
        return (*[None] * _ARGUMENTS, *gradients)


def _differentiable(
    dy: Tensor,
    inputs: Sequence[Tensor],
    segments: Segments,
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The backward's gradients by torch's own operations: autograd's, of the textbook formula."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        x, *tensors = inputs
        mask, p = None, settings.dropout
        if seeds is not None:
            mask = settings.backend.dropout_mask(seeds, (x.shape[0], x.shape[1]), p)
        cast = [tensor.to(x.dtype) for tensor in tensors]
        (((weight, bias), ((lora_a, lora_b, scale),)),) = unflatten(cast, settings.layouts)
        ends = [rows.stop for rows in segments.slices(len(x))]
        y = reference.lora_grouped(
            x, weight, lora_a, lora_b, ends, bias=bias, scale=scale, dropout=p, mask=mask
        )
    if not y.requires_grad:
        return [None] * len(inputs)
    return gradients_of([y], inputs, needs, [dy], create_graph)
