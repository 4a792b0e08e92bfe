"""The softmax of a loss and its gradient, over the logits of a chunk, by the Triton kernel."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...projection import Base, Output
from .. import torch as torch_backend
from ..protocol import LossSettings
from .cover import kernels, why_not
from .verification import UNVERIFIED, State, elementwise, run_kernels

# Rows that one verification compares: its copies of z take several times the memory of z.
_FEW = 64


def row_loss(
    z: Tensor,
    target: Tensor,
    losses: Tensor,
    settings: LossSettings,
    upstream: Tensor | None,
    gradient: bool,
) -> None:
    """Fill the losses, and with ``gradient`` z, as the torch backend does."""

    def by_kernel(matrices: Sequence) -> list | State:
        covers = partial(_covers, matrices[0])
        return run_kernels(_row_loss, matrices, (settings, gradient), covers)

    def by_torch(matrices: Sequence) -> list:
        z, target, upstream, losses = matrices
        torch_backend.row_loss(z, target, losses, settings, upstream, gradient)
        return []

    matrices: list[Any] = [z, target, upstream, losses]
    made = by_kernel(matrices)
    if made is UNVERIFIED:
        for first in range(0, len(z), _FEW):
            read: list[Any] = [m if m is None else m[first : first + _FEW] for m in matrices]
            filled = [*read[3:], *read[:1]] if gradient else read[3:]
            runs = partial(_in_place, by_kernel), partial(_in_place, by_torch)
            elementwise(*runs, [*read[:3], *filled], fills=len(filled))
    elif isinstance(made, State):
        by_torch(matrices)


def _in_place(run: Callable[..., list | State], matrices: Sequence) -> list | State:
    """Call ``run`` with z, target, upstream and losses.

    A fifth matrix receives the gradient.  If it isn't z, z keeps its elements.
    """
    z, *others = matrices[:4]
    for gradient in matrices[4:]:
        z = z if gradient is z else gradient.copy_(z)
    return run([z, *others])


def _covers(z: Tensor) -> bool:
    is_dense = z.stride(1) == 1 or z.shape[1] == 1
    return z.numel() > 0 and is_dense and not why_not(z.dtype, z.device, [Output(Base(z))])


def _row_loss(matrices: Sequence, settings: LossSettings, gradient: bool) -> list[Tensor]:
    z, target, upstream, losses = matrices
    kernels.row_loss(z, target, losses, settings, upstream, gradient)
    return []
