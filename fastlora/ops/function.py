"""The autograd node of a group of projections, for eager calls."""

import torch
from torch import Tensor

from ..projection import group
from .library import run_backward, run_forward


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
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of a LoRA layer's gradient was asked for (create_graph=True), but "
                "its backward is not differentiable: use fastlora.reference.lora_linear for that"
            )
        dropout, backend, scales = ctx.settings
        x, seed, *saved = ctx.saved_tensors
        count = 4 * len(scales)
        projections, hs = group(saved[:count], scales), saved[count:]
        needs = ctx.needs_input_grad[:1] + ctx.needs_input_grad[5:]
        dx, *gradients = run_backward(dys, x, projections, hs, needs, dropout, seed, backend)
        return dx, None, None, None, None, *gradients
