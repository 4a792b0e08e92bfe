"""The losses of rows of logits and their gradients (:mod:`..loss`), by the Triton kernel."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...blocks import slices
from ...projection import Base, Output
from .. import torch as torch_backend
from ..protocol import LossRows, LossSettings
from .cover import kernels, why_not
from .verification import UNVERIFIED, State, elementwise, run_kernels

# Rows that one verification compares: its copies of z take several times the memory of z.
_FEW = 64


def row_loss(rows: LossRows) -> None:
    """See :meth:`fastlora.backends.protocol.Backend.row_loss`."""
    made = _by_kernel(rows)
    if made is UNVERIFIED:
        for few in map(rows.part, slices(len(rows.z), _FEW)):
            filled = [few.losses, few.z] if few.gradient else [few.losses]
            tensors: list[Any] = [few.z, few.target, few.upstream, *filled]
            runs = partial(_on_tensors, _by_kernel, few), partial(_on_tensors, _by_torch, few)
            elementwise(*runs, tensors, fills=len(filled))
    elif isinstance(made, State):
        _by_torch(rows)


def _by_kernel(rows: LossRows) -> list | State:
    tensors = rows.z, rows.target, rows.upstream, rows.losses
    return run_kernels(_run, tensors, (rows.settings, rows.gradient), partial(_covers, rows.z))


def _by_torch(rows: LossRows) -> list:
    torch_backend.row_loss(rows)
    return []


def _on_tensors(
    run: Callable[[LossRows], list | State], rows: LossRows, tensors: Sequence
) -> list | State:
    """Call ``run`` with these tensors in place of those in ``rows``.

    They are z, target, upstream, losses and, if ``rows.gradient``, the memory of the gradient.  The
    gradient overwrites z where that memory is z; otherwise z is copied there first, and stays.
    """
    z, target, upstream, losses, *gradients = tensors
    for gradient in gradients:
        z = z if gradient is z else gradient.copy_(z)
    return run(rows._replace(z=z, target=target, upstream=upstream, losses=losses))


def _covers(z: Tensor) -> bool:
    is_dense = z.stride(1) == 1 or z.shape[1] == 1
    return z.numel() > 0 and is_dense and not why_not(z.dtype, z.device, [Output(Base(z))])


def _run(tensors: Sequence[Tensor], settings: LossSettings, gradient: bool) -> list[Tensor]:
    z, target, upstream, losses = tensors
    kernels.row_loss(z, target, losses, settings, upstream, gradient)
    return []
