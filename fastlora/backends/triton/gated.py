"""The elementwise part of a gated MLP, act(gate) ∘ up, by the Triton kernels."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from .. import torch as torch_backend
from ..protocol import GatedProduct
from .cover import empty_like, kernels, why_not
from .verification import State, elementwise, run_kernels


def gated(product: GatedProduct) -> Tensor:
    """act(gate) ∘ up, [M, N], as the torch backend returns it; always rounded once (``wide``)."""

    def by_torch(matrices: Sequence[Tensor]) -> list[Tensor]:
        gate, up = matrices
        return [torch_backend.gated(product._replace(gate=gate, up=up))]

    return elementwise(partial(_by_kernels, _gated, product.activation), by_torch, product[:2])[0]


def gated_backward(dy: Tensor, product: GatedProduct, d_gate: Tensor, d_up: Tensor) -> None:
    """Fill d_gate and d_up as the torch backend does; each is rounded once."""

    def by_torch(matrices: Sequence[Tensor]) -> list[Tensor]:
        dy, gate, up, d_gate, d_up = matrices
        torch_backend.gated_backward(dy, product._replace(gate=gate, up=up), d_gate, d_up)
        return []

    run = partial(_by_kernels, _gated_backward, product.activation)
    elementwise(run, by_torch, [dy, *product[:2], d_gate, d_up], fills=2)


def _by_kernels(
    function: Callable[..., list[Tensor]], activation: str, matrices: Sequence[Tensor]
) -> list[Tensor] | State:
    """The results of ``function``, captured and replayed; a State if the kernels can't be used."""
    x = matrices[0]
    return run_kernels(
        function,
        matrices,
        (activation,),
        lambda: (
            not why_not(x.dtype, x.device, ())
            and not any(kernels.why_not_gated(matrix) for matrix in matrices)
        ),
    )


def _gated(matrices: Sequence[Tensor], activation: str) -> list[Tensor]:
    gate, up = matrices
    return [kernels.gated(gate, up, activation, empty_like(gate))]


def _gated_backward(matrices: Sequence[Tensor], activation: str) -> list[Tensor]:
    dy, gate, up, d_gate, d_up = matrices
    kernels.gated_backward(dy, gate, up, activation, d_gate, d_up)
    return []
