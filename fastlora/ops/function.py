"""The autograd node of a call, for eager calls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import Settings
from ..projection import Layout, Output, flatten, per_adapter, unflatten
from .call import are_batched, kept, run_backward, run_forward, stand_in

_ARGUMENTS = 3  # x, settings, layouts: before the tensors


class LoRALinearFunction(torch.autograd.Function):
    """One node for all outputs of one x.  It saves x, the outputs' tensors, the seeds and every h.

    x is left out if neither a lora_a nor a weight needs a gradient, an h if its lora_b needs none.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, settings: Settings, layouts: Sequence[Layout], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """``tensors`` are those of the outputs, laid flat: what autograd follows."""
        ys, hs = run_forward(x, unflatten(tensors, layouts), settings)
        kept_x, kept_hs = kept(x, hs, unflatten(ctx.needs_input_grad[_ARGUMENTS:], layouts))
        ctx.save_for_backward(kept_x, settings.seeds, *tensors, *kept_hs)
        ctx.call = layouts, settings.dropout, settings.backend, x.shape
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        layouts, dropout, backend, shape = ctx.call
        x, seeds, *saved = ctx.saved_tensors
        needs_x, _, _, *needs_flat = ctx.needs_input_grad
        count = len(needs_flat)
        outputs, hs = unflatten(saved, layouts), saved[count:]
        needs, settings = unflatten(needs_flat, layouts), Settings(dropout, seeds, backend)
        has_x = x is not None
        if not has_x:
            if all(dy is None for dy in dys):
                return (None,) * (_ARGUMENTS + count)
            x = stand_in(outputs[0].base.weight, shape)
        if torch.is_grad_enabled() or are_batched(dys):
            if not has_x:
                x = torch.zeros_like(x, requires_grad=needs_x)
            dx, gradients = _differentiable(dys, x, outputs, layouts, needs_x, needs, settings)
            if not has_x:
                gradients = _with_those_of_lora_b(gradients, dys, hs, outputs, needs)
        else:
            dx, gradients = run_backward(dys, x, outputs, hs, needs_x, needs, settings)
        return dx, None, None, *flatten(gradients, layouts)


def _differentiable(
    dys: Sequence[Tensor | None],
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    layouts: Sequence[Layout],
    needs_x: bool,
    needs: Sequence[Output[bool]],
    settings: Settings,
) -> tuple[Tensor | None, list[Output[Tensor | None]]]:
    """run_backward's gradients by torch's own operations: autograd's, of the textbook formula."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        x, *tensors = [t.view_as(t) for t in (x, *flatten(outputs, layouts))]
        masks = None
        if settings.seeds is not None:
            shape = (x.numel() // max(1, x.shape[-1]), x.shape[-1])
            mask, p = settings.backend.dropout_mask, settings.dropout
            masks = [mask(seed, shape, p) for seed in settings.seeds]
        ys = reference.lora_linears(
            x,
            unflatten([tensor.to(x.dtype) for tensor in tensors], layouts),
            dropout=settings.dropout,
            masks=masks,
        )
    used = [i for i, dy in enumerate(dys) if dy is not None and ys[i].requires_grad]
    all_needs = [needs_x, *flatten(needs, layouts)]
    leaves = [t for t, need in zip((x, *tensors), all_needs, strict=True) if need]
    if not used:
        return None, unflatten([None] * len(tensors), layouts)
    asked = iter(
        torch.autograd.grad(
            [ys[i] for i in used],
            leaves,
            [dys[i] for i in used],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    dx, *gradients = [next(asked) if need else None for need in all_needs]
    return dx, unflatten(gradients, layouts)


def _with_those_of_lora_b(
    gradients: Sequence[Output[Tensor | None]],
    dys: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    outputs: Sequence[Output[Tensor]],
    needs: Sequence[Output[bool]],
) -> list[Output[Tensor | None]]:
    """The gradients, with dyᵀ h for each lora_b, from the h that was kept where x wasn't.

    No gradient of theirs reaches x.
    """
    found = []
    per_output = zip(gradients, dys, per_adapter(hs, outputs), outputs, needs, strict=True)
    for (base, of_adapters), dy, thin, output, need in per_output:
        of_lora_b = [
            _of_lora_b(dy, h, adapter.lora_b) if wanted.lora_b else None
            for h, adapter, wanted in zip(thin, output.adapters, need.adapters, strict=True)
        ]
        changed = [a._replace(lora_b=g) for a, g in zip(of_adapters, of_lora_b, strict=True)]
        found.append(Output(base, tuple(changed)))
    return found


def _of_lora_b(dy: Tensor | None, h: Tensor | None, lora_b: Tensor) -> Tensor | None:
    if dy is None or h is None:
        return None
    gradient = (dy.reshape(-1, dy.shape[-1]).T @ h).to(lora_b.dtype)
    if gradient.requires_grad:
        gradient.register_hook(_refuse)
    return gradient


def _refuse(_) -> None:
    raise NotImplementedError(
        "gradients of lora_b's gradient need x, which isn't kept where lora_a and weight are "
        "frozen: let lora_a require gradients"
    )
