"""What a backend is: the contract that ``torch`` and ``triton`` keep, and the settings of a call.

A backend is a module with these four functions.  They mean the same on every backend; the formulas
are in :mod:`.torch`, the one to read.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..projection import Output


class Settings(NamedTuple):
    """What a call is besides x and its outputs."""

    dropout: float  # the probability of dropping an input, in [0, 1); 0 while not training
    seeds: Tensor | None  # int64 [number of adapters], on x's device; None without dropout
    backend: "Backend"


class Backend(Protocol):
    """x is [M, K] throughout; ``outputs`` has one :class:`Output` for each y."""

    def forward(
        self, x: Tensor, outputs: Sequence[Output[Tensor]], settings: Settings
    ) -> tuple[list[Tensor], list[Tensor]]:
        """y [M, N] of every output, and h [M, r] of every adapter, laid end to end."""

    def backward(
        self,
        dys: Sequence[Tensor | None],
        x: Tensor,
        outputs: Sequence[Output[Tensor]],
        hs: Sequence[Tensor],
        needs_x: bool,
        needs: Sequence[Output[bool]],
        settings: Settings,
    ) -> tuple[Tensor | None, list[Output[Tensor | None]]]:
        """The gradient of x, and those of every output's tensors; None for one nobody needs.

        ``dys``: for each output [M, N], or None if the loss doesn't use it.  ``hs`` are the
        forward's.  ``needs`` says for each tensor whether its gradient is needed.
        """

    def dropout_mask(self, seed: Tensor, shape: tuple[int, int], p: float) -> Tensor:
        """The keep mask that a seed (int64, one element) makes: bool [rows, columns]."""

    def why_not(
        self, dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]
    ) -> str:
        """For the report: why a call with x of this dtype and device isn't covered; "" if it is.

        forward and backward take such a call all the same, by way of another backend.
        """
