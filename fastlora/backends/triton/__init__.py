"""The Triton backend: the kernels of ``fastlora.kernels``, on a GPU, or interpreted on a CPU.

The formulas are those of the torch backend, and so is the dropout mask, bit for bit.  A call that
the kernels don't cover runs on the torch backend, and the reason is said once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dropout import dropout_mask
from ..protocol import Call
from . import layer, segments
from .cover import TARGETS, why_not, without_launching
from .gated import gated, gated_backward

__all__ = [
    "TARGETS",
    "backward",
    "dropout_mask",
    "forward",
    "gated",
    "gated_backward",
    "h_dtype",
    "takes_experts_in_turn",
    "why_not",
    "without_launching",
]


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """As the torch backend's."""
    run = layer.forward if call.rows is None else segments.forward
    return run(inputs, seeds, call)


def backward(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: Call,
) -> list[Tensor | None]:
    """As the torch backend's."""
    run = layer.backward if call.rows is None else segments.backward
    return run(dys, inputs, hs, needs, seeds, call)


def h_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """x's."""
    return dtype


def takes_experts_in_turn(device: torch.device) -> bool:
    """No: a part would be more launches, and its rows would be counted on the host."""
    return False
