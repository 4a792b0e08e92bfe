"""One call of the op on a backend: what the autograd node and the registered op share."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..backends import Settings
from ..projection import Layout, unflatten
from ..segments import Segments
from .autocast import autocast_off


def run_forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, settings: Settings
) -> tuple[list[Tensor], list[Tensor]]:
    """Every output, with x's leading dimensions, and the h [M, r] of every adapter."""
    x, *tensors = inputs
    ys, hs = settings.backend.forward([as_matrix(x), *tensors], seeds, settings)
    if x.dim() != 2:
        # Resized, not viewed: autograd forbids in-place changes of a view that a Function returns.
        ys = [y.resize_(*x.shape[:-1], y.shape[-1]) for y in ys]
    return ys, hs


def run_backward(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None."""
    x, *tensors = inputs
    dys = [None if dy is None else as_matrix(dy) for dy in dys]
    with autocast_off(x.device.type):
        gradients = settings.backend.backward(
            dys, [as_matrix(x), *tensors], hs, needs, seeds, settings
        )
    dx = gradients[0]
    if dx is not None and x.dim() != 2:
        gradients[0] = dx.view(x.shape)
    return gradients


def run_grouped(
    inputs: Sequence[Tensor], segments: Segments, seeds: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """y [S, N] of experts, and the h [S, r]."""
    x, *tensors = inputs
    backend = settings.backend
    return backend.forward_grouped([as_matrix(x), *tensors], segments, seeds, settings)


def run_grouped_backward(
    dy: Tensor,
    inputs: Sequence[Tensor],
    segments: Segments,
    h: Tensor,
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None."""
    x, *tensors = inputs
    with autocast_off(x.device.type):
        return settings.backend.backward_grouped(
            as_matrix(dy), [as_matrix(x), *tensors], segments, h, needs, seeds, settings
        )


def kept(
    x: Tensor, hs: Sequence[Tensor], needs: Sequence[bool], layouts: tuple[Layout, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """What the backward will read of x and of every h, given which inputs need gradients."""
    reads_x, reads_h = _is_read(tuple(needs), layouts)
    read = [h if reads else None for h, reads in zip(hs, reads_h, strict=True)]
    return x if reads_x else None, read


@lru_cache(maxsize=1024)
def _is_read(needs: tuple[bool, ...], layouts: tuple[Layout, ...]) -> tuple[bool, list[bool]]:
    """The gradients of weight and lora_a are products with x, that of lora_b is one with h."""
    reads_x, reads_h = False, []
    for base, adapters in unflatten(needs[1:], layouts):
        reads_x = reads_x or base.weight
        for lora_a, lora_b, _ in adapters:
            reads_x = reads_x or lora_a
            reads_h.append(lora_b)
    return reads_x, reads_h


def stand_in(weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of x's shape, dtype and device, for a backward that reads no element of x."""
    return weight.new_empty(shape, dtype=dtype)


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], rows or columns dense: copied only if its strides or sign need it."""
    matrix = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).resolve_neg()
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


def gradients_of(
    ys: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dys: Sequence[Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    """Autograd's gradient of each input that needs one, else None."""
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
