"""The autograd node of a call, for eager calls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import Settings
from ..formats.format import Quantised
from ..projection import Adapter, Base, Output, unflatten
from .call import are_batched, gradients_of, kept, run_backward, run_forward, stand_in

_ARGUMENTS = 2  # seeds and settings, before the inputs


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
        ctx, seeds: Tensor | None, settings: Settings, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """``inputs``: x, and the outputs' tensors, laid flat: what autograd follows."""
        ys, hs = run_forward(inputs, seeds, settings)
        x, *tensors = inputs
        kept_x, kept_hs = kept(x, hs, ctx.needs_input_grad[_ARGUMENTS:], settings.layouts)
        ctx.save_for_backward(seeds, kept_x, *tensors, *kept_hs)
        ctx.settings, ctx.shape, ctx.dtype = settings, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, needs = ctx.settings, ctx.needs_input_grad[_ARGUMENTS:]
        seeds, *saved = ctx.saved_tensors
        inputs, hs = saved[: len(needs)], saved[len(needs) :]
        has_x = inputs[0] is not None
        if not has_x:
            if all(dy is None for dy in dys):
                return (None,) * (_ARGUMENTS + len(needs))
            inputs[0] = stand_in(inputs[1], ctx.shape, ctx.dtype)
        if torch.is_grad_enabled() or are_batched(dys):
            if not has_x:
                inputs[0] = unread(inputs[0], needs[0], hs)
            gradients = differentiable(dys, inputs, needs, seeds, settings)
        else:
            gradients = run_backward(dys, inputs, hs, needs, seeds, settings)
        return None, None, *gradients


def differentiable(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """run_backward's gradients by torch's own operations: autograd's, of the textbook formula."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        x, *tensors = inputs
        masks = None
        if seeds is not None:
            shape = (x.numel() // max(1, x.shape[-1]), x.shape[-1])
            masks = [settings.backend.dropout_mask(seed, shape, settings.dropout) for seed in seeds]
        ys = reference.lora_linears(
            x,
            [cast_output(output, x.dtype) for output in unflatten(tensors, settings.layouts)],
            dropout=settings.dropout,
            masks=masks,
        )
    used = [i for i, dy in enumerate(dys) if dy is not None and ys[i].requires_grad]
    if not used:
        return [None] * len(inputs)
    used_ys, used_dys = [ys[i] for i in used], [dys[i] for i in used]
    return gradients_of(used_ys, inputs, needs, used_dys, create_graph)


def cast_output(output: Output[Tensor], dtype: torch.dtype) -> Output[Tensor]:
    """With every tensor in this dtype, and a weight that is packed made dense."""
    (weight, bias), adapters = output
    dense = weight.dense(dtype) if isinstance(weight, Quantised) else weight.to(dtype)
    return Output(
        Base(dense, None if bias is None else bias.to(dtype)),
        tuple([Adapter(a.to(dtype), b.to(dtype), scale) for a, b, scale in adapters]),
    )


def unread(x: Tensor, needs_x: bool, hs: Sequence[Tensor | None]) -> Tensor:
    """Zeros of x's shape, for a textbook backward without the gradients that read x."""
    if any(h is not None for h in hs):
        raise NotImplementedError(
            "gradients of gradients, and for many dys at once, need x, which isn't kept where "
            "lora_a and weight are frozen: let lora_a require gradients"
        )
    return torch.zeros_like(x, requires_grad=needs_x)
