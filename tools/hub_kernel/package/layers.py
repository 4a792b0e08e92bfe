"""Layers for ``kernels.kernelize``: forward and backward of a frozen layer with its adapter."""

import torch
from torch import Tensor, nn

from .launchers import gemm_lowrank, project, weight_grad

_PRECISION = "ieee"  # exact float32 products; 16-bit inputs use 16-bit products


class _LoRALinear(torch.autograd.Function):
    """y = x weightᵀ + scale · (x lora_aᵀ) lora_bᵀ (+ bias), x [M, K]."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale):
        y = x.new_empty(x.shape[0], weight.shape[0])
        (h,) = project(x, [lora_a.T], [scale], precision=_PRECISION)
        gemm_lowrank(y, [x], [weight.T], [h], [lora_b.T], bias=bias, precision=_PRECISION)
        ctx.save_for_backward(x, weight, lora_a, lora_b, h)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_a, lora_b, h = ctx.saved_tensors
        d_lora_a, d_lora_b = torch.empty_like(lora_a), torch.empty_like(lora_b)
        # One pass over dy computes d lora_b and dh = scale · dy lora_b.
        dh = weight_grad(dy, [h], [d_lora_b], b=lora_b, factor=ctx.scale, precision=_PRECISION)
        weight_grad(x, [dh], [d_lora_a.T], precision=_PRECISION)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)  # x may be transposed
            gemm_lowrank(dx, [dy], [weight], [dh], [lora_a], precision=_PRECISION)
        return dx, None, None, d_lora_a, d_lora_b, None


class LoRALinear(nn.Module):
    """The forward of a layer with these attributes, weight and bias frozen, without dropout.

    ``weight`` [N, K], ``bias`` [N] or None, ``lora_A`` [r, K], ``lora_B`` [N, r], ``scaling``.
    """

    has_backward = True
    can_torch_compile = False

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scaling: float

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] gives [..., N].  Raises ValueError for a trained weight or bias."""
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            raise ValueError("weight and bias must be frozen: call requires_grad_(False)")
        tensors = self.weight, self.bias, self.lora_A, self.lora_B
        y = _LoRALinear.apply(x.reshape(-1, x.shape[-1]), *tensors, float(self.scaling))
        return y.view(*x.shape[:-1], y.shape[-1])
