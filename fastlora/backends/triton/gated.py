"""The elementwise part of a gated MLP, act(gate) ∘ up, by the Triton kernels."""

from collections.abc import Sequence

from torch import Tensor

from .. import torch as torch_backend
from ..protocol import GatedProduct
from .supported import empty_like, kernels, why_not
from .verification import KernelFunction, run_kernels


def gated(product: GatedProduct) -> Tensor:
    """act(gate) ∘ up, [M, N], as the torch backend returns it; always rounded once (``wide``)."""
    return run_kernels(_FORWARD, product[:2], product[2:])[0]


def gated_backward(dy: Tensor, product: GatedProduct, d_gate: Tensor, d_up: Tensor) -> None:
    """Fill d_gate and d_up as the torch backend does; each is rounded once."""
    run_kernels(_BACKWARD, [dy, *product[:2], d_gate, d_up], product[2:])


def _forward(matrices: Sequence[Tensor], activation: str, wide: bool) -> list[Tensor]:
    gate, up = matrices
    return [kernels.gated(gate, up, activation, empty_like(gate))]


def _forward_by_torch(matrices: Sequence[Tensor], activation: str, wide: bool) -> list[Tensor]:
    gate, up = matrices
    return [torch_backend.gated(GatedProduct(gate, up, activation, wide))]


def _backward(matrices: Sequence[Tensor], activation: str, wide: bool) -> list[Tensor]:
    dy, gate, up, d_gate, d_up = matrices
    kernels.gated_backward(dy, gate, up, activation, d_gate, d_up)
    return []


def _backward_by_torch(matrices: Sequence[Tensor], activation: str, wide: bool) -> list[Tensor]:
    dy, gate, up, d_gate, d_up = matrices
    torch_backend.gated_backward(dy, GatedProduct(gate, up, activation, wide), d_gate, d_up)
    return []


def _covers(matrices: Sequence[Tensor], activation: str, wide: bool) -> bool:
    x = matrices[0]
    return not why_not(x.dtype, x.device, ()) and not any(map(kernels.why_not_gated, matrices))


# writes: the places of d_gate and d_up in the list of matrices.
_FORWARD = KernelFunction(_forward, _forward_by_torch, _covers)
_BACKWARD = KernelFunction(_backward, _backward_by_torch, _covers, writes=(3, 4))
