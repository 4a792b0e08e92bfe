"""The autograd node of a group of projections, for eager calls."""

import torch
from torch import Tensor

from .library import run_backward, run_forward


class LoRALinearFunction(torch.autograd.Function):
    """One node for all projections of one x.  It saves x, the parameters, the seed and h, and
    nothing else."""

    @staticmethod
    def forward(
        ctx, x, seed, scales, dropout, backend, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, hs = run_forward(x, parameters, scales, dropout, seed, backend)
        ctx.save_for_backward(x, seed, *parameters, *hs)
        ctx.settings = scales, dropout, backend
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of a LoRA layer's gradient was asked for (create_graph=True), but "
                "its backward is not differentiable: use fastlora.reference.lora_linear for that"
            )
        x, seed, *rest = ctx.saved_tensors
        scales, dropout, backend = ctx.settings
        parameters, hs = rest[: 4 * len(scales)], rest[4 * len(scales) :]
        needs = ctx.needs_input_grad[:1] + ctx.needs_input_grad[5:]
        dx, *gradients = run_backward(dys, x, parameters, hs, needs, scales, dropout, seed, backend)
        return dx, None, None, None, None, *gradients
