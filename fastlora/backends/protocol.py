"""What a backend is: the contract that ``torch`` and ``triton`` keep, and the record of a call.

A backend is a module with these functions.  They mean the same on every backend; the formulas
are told in :mod:`.torch` and written in :mod:`.formula`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..projection import Layout, Output
from ..rows import Rows


class Call(NamedTuple):
    """What a call is besides its tensors."""

    layouts: tuple[Layout, ...]  # of its outputs
    dropout: float  # the probability of dropping an input, in [0, 1); 0 while not training
    backend: "Backend"
    rows: Rows | None = None  # how x's rows are cut into segments; None: they aren't
    # Launches that the backend captured for a forward with inputs of these shapes, strides, dtypes,
    # devices and addresses modulo 16; None where they may differ from call to call.
    captured: dict | None = None
    is_few: bool = False  # so few rows that torch's autograd is to follow the composite path


class LossSettings(NamedTuple):
    """The numbers of a loss's formulas (:mod:`.loss`)."""

    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0


class Backend(Protocol):
    """``inputs`` are x [M, K] and the tensors of the outputs, laid flat as the layouts say.

    ``seeds`` are int64 [number of adapters], on x's device; None without dropout.  Experts have
    one of all rows, many adapters each one of its own rows, in their order.
    """

    def forward(
        self, inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
    ) -> tuple[list[Tensor], list[Tensor]]:
        """y [M, N] of every output, and h [M, r] of every adapter, laid end to end.

        Many adapters have one h, [M, the largest r], in the sorted order.  Nobody's rows of experts
        are zero, and nothing depends on those of x.  Neither this nor the backward waits for a GPU
        where the kernels cover it, and no expert's weight or bias trains.
        """

    def backward(
        self,
        dys: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        hs: Sequence[Tensor | None],
        needs: Sequence[bool],
        seeds: Tensor | None,
        call: Call,
    ) -> list[Tensor | None]:
        """The gradient of each input that needs one, else None.

        ``dys``: for each output [M, N], or None if the loss doesn't use it.  ``hs`` are the
        forward's.  Among many adapters, one without rows may get None.
        """

    def takes_experts_in_turn(self, device: torch.device) -> bool:
        """Whether there is nothing to win with rows of many experts at once.

        Then it may be given those of some experts, and of the next ones in another call.
        """

    def gated(self, gate: Tensor, up: Tensor, activation: str, wide: bool = False) -> Tensor:
        """act(gate) ∘ up, [M, N], contiguous.

        gate and up [M, N] have columns that lie end to end.  ``activation`` is one of
        ``gated.ACTIVATIONS``.  ``wide``: matrices of 16 bits are to be computed with in float32,
        and what comes out is rounded once; else a backend may round each step.
        """

    def gated_backward(
        self,
        dy: Tensor,
        gate: Tensor,
        up: Tensor,
        activation: str,
        d_gate: Tensor,
        d_up: Tensor,
        wide: bool = False,
    ) -> None:
        """Fill d_gate = act'(gate) ∘ dy ∘ up and d_up = dy ∘ act(gate); d_gate may be dy itself."""

    def row_loss(
        self,
        z: Tensor,
        target: Tensor,
        losses: Tensor,
        settings: LossSettings,
        upstream: Tensor | None,
        gradient: bool,
    ) -> None:
        """Fill the losses [rows], float32 or wider, of logits z [rows, V] and int64 targets [rows].

        With ``gradient``, z becomes the gradient of each row's loss, times the row's number in
        ``upstream``, if given.  The formulas are those of :mod:`.loss`.
        """

    def dropout_mask(self, seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
        """The keep mask that a seed (int64, one element) makes: bool [rows, columns]."""

    def h_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """That of every h, for x of this dtype on this device.  It runs nothing."""

    # The backend that takes what this one doesn't cover.
    HANDS_TO: str

    def why_not(
        self, dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]
    ) -> str:
        """For the report: why a call with x of this dtype and device isn't covered; "" if it is.

        forward and backward take such a call all the same, by way of another backend.
        """
