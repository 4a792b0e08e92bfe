"""The elementwise part of a gated MLP, act(gate) ∘ up, by the Triton kernels."""

from collections.abc import Callable, Sequence

from torch import Tensor

from .. import torch as torch_backend
from . import first_contact
from .cover import empty_like, kernels, why_not


def gated(gate: Tensor, up: Tensor, activation: str, wide: bool = False) -> Tensor:
    """act(gate) ∘ up, [M, N], as the torch backend returns it; always rounded once (``wide``)."""

    def by_torch(gate: Tensor, up: Tensor) -> Tensor:
        return torch_backend.gated(gate, up, activation, wide)

    def by_kernels(*matrices: Tensor) -> Tensor:
        made = _of_gated(_gated, matrices, activation)
        return by_torch(*matrices) if made is None or made[0] is None else made[0]

    return first_contact.elementwise(by_kernels, by_torch, gate, up)


def gated_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    d_gate: Tensor,
    d_up: Tensor,
    wide: bool = False,
) -> None:
    """Fill d_gate and d_up as the torch backend does; each is rounded once."""

    def by_torch(dy: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
        torch_backend.gated_backward(dy, gate, up, activation, d_gate, d_up, wide)

    def by_kernels(*matrices: Tensor) -> None:
        if _of_gated(_gated_backward, matrices, activation) is None:
            by_torch(*matrices)

    first_contact.elementwise(by_kernels, by_torch, dy, gate, up, d_gate, d_up, fills=2)


def _of_gated(
    function: Callable[..., list[Tensor]], matrices: Sequence[Tensor], activation: str
) -> list[Tensor | None] | None:
    """The results of ``function``, captured and replayed; None if the kernels don't cover it."""
    x = matrices[0]
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
