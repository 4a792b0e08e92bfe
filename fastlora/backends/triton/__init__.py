"""The Triton backend: the kernels of ``fastlora.kernels``, on a GPU, or interpreted on a CPU.

The formulas are those of the torch backend, and so is the dropout mask, bit for bit.  A call that
the kernels don't cover runs on the torch backend, and the reason is said once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...projection import Output
from ..dropout import dropout_mask
from .cover import TARGETS, why_not, without_launching
from .gated import gated, gated_backward
from .grouped import backward_grouped, forward_grouped
from .layer import backward, forward
from .multi import backward_multi, forward_multi

__all__ = [
    "TARGETS",
    "backward",
    "backward_grouped",
    "backward_multi",
    "dropout_mask",
    "forward",
    "forward_grouped",
    "forward_multi",
    "gated",
    "gated_backward",
    "h_dtype",
    "is_small",
    "takes_experts_in_turn",
    "why_not",
    "without_launching",
]


def h_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """x's."""
    return dtype


def is_small(x: Tensor, outputs: Sequence[Output[Tensor]]) -> bool:
    """Never: a GPU's calls are kernels."""
    return False


def takes_experts_in_turn(device: torch.device) -> bool:
    """No: a part would be more launches, and its rows would be counted on the host."""
    return False
