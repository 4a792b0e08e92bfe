"""The losses of rows of logits and their gradients (:mod:`..loss`), by the Triton kernel."""

from collections.abc import Sequence

from torch import Tensor

from ...call.projection import Base, Output
from .. import torch as torch_backend
from ..protocol import LossRows, LossSettings
from .supported import kernels, why_not
from .verification import KernelFunction, run_kernels

# Rows that one verification compares: its copies of z take several times the memory of z.
_FEW = 64


def row_loss(rows: LossRows) -> None:
    """See :meth:`fastlora.backends.protocol.Backend.row_loss`."""
    z, target, losses, settings, upstream, gradient = rows
    function = _WITH_GRADIENT if gradient else _LOSSES
    run_kernels(function, [z, target, losses, upstream], (settings, gradient))


def _run(tensors: Sequence[Tensor], settings: LossSettings, gradient: bool) -> list[Tensor]:
    z, target, losses, upstream = tensors
    kernels.row_loss(z, target, losses, settings, upstream, gradient)
    return []


def _by_torch(tensors: Sequence[Tensor], settings: LossSettings, gradient: bool) -> list[Tensor]:
    z, target, losses, upstream = tensors
    torch_backend.row_loss(LossRows(z, target, losses, settings, upstream, gradient))
    return []


def _covers(tensors: Sequence[Tensor], settings: LossSettings, gradient: bool) -> bool:
    z = tensors[0]
    is_dense = z.stride(1) == 1 or z.shape[1] == 1
    return z.numel() > 0 and is_dense and not why_not(z.dtype, z.device, [Output(Base(z))])


# writes: the places of the losses (2), and of z (0), in the list of tensors.
_LOSSES = KernelFunction(_run, _by_torch, _covers, writes=(2,), most_rows=_FEW)
_WITH_GRADIENT = _LOSSES._replace(writes=(0, 2))
