"""One call of the op on a backend: what the autograd node and the registered op share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Settings
from ..projection import Output
from .autocast import autocast_off


def run_forward(
    x: Tensor, outputs: Sequence[Output[Tensor]], settings: Settings
) -> tuple[list[Tensor], list[Tensor]]:
    """Every output, with x's leading dimensions, and the h [M, r] of every adapter."""
    ys, hs = settings.backend.forward(as_matrix(x), outputs, settings)
    if x.dim() != 2:
        # Resized, not viewed: autograd forbids in-place changes of a view that a Function returns.
        ys = [y.resize_(*x.shape[:-1], y.shape[-1]) for y in ys]
    return ys, hs


def run_backward(
    dys: Sequence[Tensor | None],
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    hs: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[Output[bool]],
    settings: Settings,
) -> tuple[Tensor | None, list[Output[Tensor | None]]]:
    """The gradients of x and of the outputs' tensors, or None where nobody needs them."""
    dys = [None if dy is None else as_matrix(dy) for dy in dys]
    with autocast_off(x.device.type):
        dx, gradients = settings.backend.backward(
            dys, as_matrix(x), outputs, hs, needs_x, needs, settings
        )
    if dx is not None and x.dim() != 2:
        dx = dx.view(x.shape)
    return dx, gradients


def kept(
    x: Tensor, hs: Sequence[Tensor], needs: Sequence[Output[bool]]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """What the backward will read of x and of every h, given which gradients are needed.

    The gradients of weight and lora_a are products with x, that of lora_b is one with h.
    """
    reads_x, reads_h = False, []
    for base, adapters in needs:
        reads_x = reads_x or base.weight
        for lora_a, lora_b, _ in adapters:
            reads_x = reads_x or lora_a
            reads_h.append(lora_b)
    read = [h if reads else None for h, reads in zip(hs, reads_h, strict=True)]
    return x if reads_x else None, read


def stand_in(weight: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of x's shape, dtype and device, for a backward that reads no element of x."""
    return weight.new_empty(shape)


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], rows or columns dense: copied only if its strides need it."""
    matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    strides = matrix.stride()
    return matrix if 1 in strides and 0 not in strides else matrix.contiguous()


def are_batched(dys: Sequence[Tensor | None]) -> bool:
    """Whether these stand for many gradients each: ``is_grads_batched``, or vmap of a backward.

    torch's own operations take them; kernels, and what writes into a buffer, don't.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return any(dy is not None and is_batched(dy) for dy in dys)
