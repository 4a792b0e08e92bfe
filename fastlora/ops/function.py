"""The autograd node of a group of projections, for eager calls."""

import torch
from torch import Tensor

from .. import reference
from ..projection import group
from .library import are_batched, run_backward, run_forward


class LoRALinearFunction(torch.autograd.Function):
    """One node for all projections of one x.  It saves x, the parameters, the seed and h."""

    @staticmethod
    def forward(ctx, x, seed, dropout, backend, projections, *tensors) -> tuple[Tensor, ...]:
        """``tensors`` are those of ``projections``, laid flat: what autograd follows."""
        ys, hs = run_forward(x, projections, dropout, seed, backend)
        ctx.save_for_backward(x, seed, *tensors, *hs)
        ctx.settings = dropout, backend, [projection.scale for projection in projections]
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        dropout, backend, scales = ctx.settings
        x, seed, *saved = ctx.saved_tensors
        count = 4 * len(scales)
        tensors, hs = saved[:count], saved[count:]
        needs = ctx.needs_input_grad[:1] + ctx.needs_input_grad[5:]
        if torch.is_grad_enabled() or are_batched(dys):
            dx, *gradients = _differentiable(dys, x, tensors, scales, needs, dropout, seed, backend)
        else:
            projections = group(tensors, scales)
            dx, *gradients = run_backward(dys, x, projections, hs, needs, dropout, seed, backend)
        return dx, None, None, None, None, *gradients


def _differentiable(dys, x, tensors, scales, needs, dropout, seed, backend) -> list[Tensor | None]:
    """run_backward's gradients by torch's own operations: autograd's, of the textbook formula."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        x, *tensors = (None if t is None else t.view_as(t) for t in (x, *tensors))
        projections = group([None if t is None else t.to(x.dtype) for t in tensors], scales)
        shape = (x.numel() // max(1, x.shape[-1]), x.shape[-1])
        masks = None if seed is None else [backend.dropout_mask(s, shape, dropout) for s in seed]
        ys = reference.lora_linears(x, projections, dropout=dropout, masks=masks)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    leaves = [t for t, need in zip((x, *tensors), needs, strict=True) if need]
    gradients = iter(
        torch.autograd.grad(
            [ys[i] for i in used],
            leaves,
            [dys[i] for i in used],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(gradients) if need else None for need in needs]
