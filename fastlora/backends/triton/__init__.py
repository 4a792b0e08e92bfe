"""The Triton backend: the kernels of ``fastlora.kernels``, on a GPU, or interpreted on a CPU.

It computes the formulas of the torch backend, with bit for bit the same dropout mask.  A call that
the kernels don't cover runs on the torch backend, and a warning says the reason once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dropout import dropout_mask as dropout_mask
from ..protocol import BackwardCall, Call
from . import grouped as experts
from . import linear as layer
from . import many
from . import measured as measured
from .gated import gated as gated
from .gated import gated_backward as gated_backward
from .row_loss import row_loss as row_loss
from .supported import why_not as why_not
from .verification import environment as environment
from .verification import read_records as read_records

HANDS_TO = "torch"


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """See :meth:`fastlora.backends.protocol.Backend.forward`."""
    return _module_of(call).forward(inputs, seeds, call)


def backward(given: BackwardCall) -> list[Tensor | None]:
    """See :meth:`fastlora.backends.protocol.Backend.backward`."""
    return _module_of(given.call).backward(given)


def _module_of(call: Call) -> Any:
    if call.rows is None:
        return layer
    return many if call.rows.has_one_base else experts


def h_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of x."""
    return dtype


def takes_experts_in_turn(device: torch.device) -> bool:
    """False, because each call adds launches and needs its number of rows on the host."""
    return False
