"""The autograd node of a group of projections, for eager calls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..projection import Projection, group, outputs_of
from .library import are_batched, kept, run_backward, run_forward, stand_in

_TENSORS = 5  # where the tensors begin among the node's arguments


class LoRALinearFunction(torch.autograd.Function):
    """One node for all projections of one x.  It saves x, the parameters, the seed and h.

    But not x where no lora_a and no weight trains, nor an h whose lora_b doesn't.
    """

    @staticmethod
    def forward(ctx, x, seed, dropout, backend, projections, *tensors) -> tuple[Tensor, ...]:
        """``tensors`` are those of ``projections``, laid flat: what autograd follows."""
        ys, hs = run_forward(x, projections, dropout, seed, backend)
        ctx.save_for_backward(*kept(x, seed, tensors, hs, ctx.needs_input_grad[_TENSORS:]))
        ctx.settings = dropout, backend, [projection.scale for projection in projections]
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        dropout, backend, scales = ctx.settings
        x, seed, *saved = ctx.saved_tensors
        count = 4 * len(scales)
        tensors, hs = saved[:count], saved[count:]
        needs = ctx.needs_input_grad[:1] + ctx.needs_input_grad[_TENSORS:]
        projections, has_x = group(tensors, scales), x is not None
        if not has_x:
            if all(dy is None for dy in dys):
                return (None,) * (_TENSORS + count)
            x = stand_in(dys, ctx.shape)
        if torch.is_grad_enabled() or are_batched(dys):
            if not has_x:
                x = torch.zeros_like(x, requires_grad=needs[0])
            dx, *gradients = _differentiable(dys, x, tensors, scales, needs, dropout, seed, backend)
            if not has_x:
                gradients[2::4] = _of_lora_b(dys, hs, projections, needs[3::4])
        else:
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


def _of_lora_b(
    dys: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    projections: Sequence[Projection],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dyᵀ h for each lora_b, from the h that was kept where x wasn't: no gradient reaches x."""
    gradients: list[Tensor | None] = []
    for i, h, projection, need in zip(outputs_of(projections), hs, projections, needs, strict=True):
        dy, gradient = dys[i], None
        if need and dy is not None and h is not None:
            gradient = dy.reshape(-1, dy.shape[-1]).T @ h
            gradient = gradient.to(projection.lora_b.dtype)
            if gradient.requires_grad:
                gradient.register_hook(_refuse)
        gradients.append(gradient)
    return gradients


def _refuse(_) -> None:
    raise NotImplementedError(
        "gradients of lora_b's gradient need x, which isn't kept where lora_a and weight are "
        "frozen: let lora_a require gradients"
    )
