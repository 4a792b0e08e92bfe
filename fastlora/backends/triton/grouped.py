"""Experts by the Triton kernels."""

from collections.abc import Sequence

from torch import Tensor

from ...segments import Segments
from .. import torch as torch_backend
from ..protocol import Settings


def forward_grouped(
    inputs: Sequence[Tensor], segments: Segments, seeds: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The torch backend's: there are no kernels for it as yet."""
    return torch_backend.forward_grouped(inputs, segments, seeds, settings)


def backward_grouped(
    dy: Tensor,
    inputs: Sequence[Tensor],
    segments: Segments,
    h: Tensor,
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The torch backend's: there are no kernels for it as yet."""
    return torch_backend.backward_grouped(dy, inputs, segments, h, needs, seeds, settings)
