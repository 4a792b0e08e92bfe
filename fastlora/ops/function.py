"""The autograd node of a group of projections, for eager calls."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import backend_name
from .library import run_backward, run_forward


class LoRALinearFunction(torch.autograd.Function):
    """One node for all projections of one x.  It saves x, the parameters, the seed and h, and nothing else."""

    @staticmethod
    def forward(ctx, x, seed, scales, dropout, backend, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        backend = backend_name(backend)  # the backward may run in a thread that the context manager doesn't reach
        ys, hs = run_forward(x, parameters, scales, dropout, seed, backend)
        ctx.save_for_backward(x, seed, *parameters, *hs)
        ctx.settings = scales, dropout, backend
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seed, *rest = ctx.saved_tensors
        scales, dropout, backend = ctx.settings
        parameters, hs = rest[: 4 * len(scales)], rest[4 * len(scales) :]
        needs = ctx.needs_input_grad[:1] + ctx.needs_input_grad[5:]
        dx, *gradients = run_backward(dys, x, parameters, hs, needs, scales, dropout, seed, backend)
        return dx, None, None, None, None, *gradients
