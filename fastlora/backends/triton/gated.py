"""The middle of a gated MLP by the Triton kernels."""

from collections.abc import Callable, Sequence

from torch import Tensor

from .. import torch as torch_backend
from .cover import current, empty_like, kernels, why_not


def gated(gate: Tensor, up: Tensor, activation: str, wide: bool = False) -> Tensor:
    """As the torch backend's: act(gate) ∘ up, [M, N], rounded once, whether ``wide`` or not."""
    made = _of_gated(_gated, [gate, up], activation)
    if made is None:
        return torch_backend.gated(gate, up, activation, wide)
    (product,) = made
    assert product is not None
    return product


def gated_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    d_gate: Tensor,
    d_up: Tensor,
    wide: bool = False,
) -> None:
    """As the torch backend's: d_gate and d_up are filled, each rounded once."""
    if _of_gated(_gated_backward, [dy, gate, up, d_gate, d_up], activation) is None:
        torch_backend.gated_backward(dy, gate, up, activation, d_gate, d_up, wide)


def _of_gated(
    function: Callable[..., list[Tensor]], matrices: Sequence[Tensor], activation: str
) -> list[Tensor | None] | None:
    """What a call of these matrices comes to; None if the kernels don't cover it."""
    x = matrices[0]
    with current(x.device):
        return kernels.replayed(
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
