"""The autograd node of a call, for eager calls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Call
from .call import are_batched, differentiable, kept, run_backward, run_forward, stand_in

_ARGUMENTS = 3  # seeds, ends and call, before the inputs


class LoRALinearFunction(torch.autograd.Function):
    """One node for all outputs of one x.  It saves the inputs, the seeds and every h.

    x is left out if neither a lora_a nor a weight needs a gradient, an h if its lora_b needs none.
    """

    @classmethod
    def apply(cls, *arguments):
        """As torch's, but without a look for what outlived a transform of ``torch.func``."""
        return super(torch.autograd.Function, cls).apply(*arguments)

    @staticmethod
    def forward(
        ctx, seeds: Tensor | None, ends: Tensor | None, call: Call, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """``inputs``: x, and the outputs' tensors, laid flat: what autograd follows.

        ``ends``: of experts, so that a later change of them is an error.
        """
        ys, hs = run_forward(inputs, seeds, call)
        x, *tensors = inputs
        one_h = call.rows is not None and call.rows.shares_base
        kept_x, kept_hs = kept(x, hs, ctx.needs_input_grad[_ARGUMENTS:], call.layouts, one_h)
        ctx.save_for_backward(seeds, ends, kept_x, *tensors, *kept_hs)
        ctx.call, ctx.shape, ctx.dtype = call, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[_ARGUMENTS:]
        seeds, _, *saved = ctx.saved_tensors
        inputs, hs = saved[: len(needs)], saved[len(needs) :]
        nothing = (None,) * _ARGUMENTS
        if all([dy is None for dy in dys]):
            return (*nothing, *[None] * len(needs))
        has_x = inputs[0] is not None
        if not has_x:
            inputs[0] = stand_in(inputs[1], ctx.shape, ctx.dtype)
        if torch.is_grad_enabled() or are_batched(dys):
            if not has_x:
                inputs[0] = unread(inputs[0], needs[0], hs)
            gradients = differentiable(dys, inputs, needs, seeds, call)
        else:
            gradients = run_backward(dys, inputs, hs, needs, seeds, call)
        if call.rows is not None and call.rows.of_banks:
            gradients = _with_zeros(gradients, inputs, needs)
        return (*nothing, *gradients)


def _with_zeros(
    gradients: list[Tensor | None], inputs: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Zeros for the last adapter if it has none: without any, unbind gives its bank no gradient."""
    last = zip(gradients[-2:], inputs[-2:], needs[-2:], strict=True)
    filled = [
        tensor.new_zeros(()).expand_as(tensor) if need and gradient is None else gradient
        for gradient, tensor, need in last
    ]
    return [*gradients[:-2], *filled]


def unread(x: Tensor, needs_x: bool, hs: Sequence[Tensor | None]) -> Tensor:
    """Zeros of x's shape, for a textbook backward without the gradients that read x."""
    if any(h is not None for h in hs):
        raise NotImplementedError(
            "gradients of gradients, and for many dys at once, need x, which isn't kept where "
            "lora_a and weight are frozen: let lora_a require gradients"
        )
    return torch.zeros_like(x, requires_grad=needs_x)
