"""What a backend is: the contract that ``torch`` and ``triton`` keep, and the record of a call.

A backend is a module with these functions.  They mean the same on every backend; the formulas
are in :mod:`.torch`, the one to read.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..mapping import Mix, Sorted
from ..projection import Layout, Output
from ..segments import Segments


class Settings(NamedTuple):
    """What a call is besides its tensors."""

    layouts: tuple[Layout, ...]  # of its outputs
    dropout: float  # the probability of dropping an input, in [0, 1); 0 while not training
    backend: "Backend"
    # What the backend found out for a forward with inputs of these shapes, strides, dtypes, devices
    # and addresses modulo 16; None where they may differ from call to call.
    kept: dict | None = None
    is_small: bool = False  # torch's autograd is to follow its operations, without a node of ours


class Backend(Protocol):
    """``inputs`` are x [M, K] and the tensors of the outputs, laid flat as the layouts say.

    ``seeds`` are int64 [number of adapters], on x's device; None without dropout.
    """

    def forward(
        self, inputs: Sequence[Tensor], seeds: Tensor | None, settings: Settings
    ) -> tuple[list[Tensor], list[Tensor]]:
        """y [M, N] of every output, and h [M, r] of every adapter, laid end to end."""

    def backward(
        self,
        dys: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        hs: Sequence[Tensor],
        needs: Sequence[bool],
        seeds: Tensor | None,
        settings: Settings,
    ) -> list[Tensor | None]:
        """The gradient of each input that needs one, else None.

        ``dys``: for each output [M, N], or None if the loss doesn't use it.  ``hs`` are the
        forward's.
        """

    def forward_grouped(
        self,
        inputs: Sequence[Tensor],
        segments: Segments,
        seeds: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        """y [S, N] and h [S, r] of experts: one output with one adapter, whose tensors are stacked.

        ``inputs``: x [S, K], cut into segments; weight [E, N, K], bias [E, N] if any, lora_a
        [E, r, K], lora_b [E, N, r].  Nobody's rows of y are zero, and nothing depends on those of
        x.  Neither this nor the backward waits for a GPU where the kernels cover it.
        """

    def backward_grouped(
        self,
        dy: Tensor,
        inputs: Sequence[Tensor],
        segments: Segments,
        h: Tensor,
        needs: Sequence[bool],
        seeds: Tensor | None,
        settings: Settings,
    ) -> list[Tensor | None]:
        """The gradient of each input that needs one, else None; nobody's rows of dx are zero."""

    def forward_multi(
        self, x: Tensor, output: Output[Tensor], batch: Sorted, mix: Mix, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y [M, N] and h [M, the largest r] of many adapters: all those of one output.

        Each item of the batch has as many rows of x [M, K].  h is in the sorted order.  ``seeds``
        has one for each adapter, whose mask is of its own rows, in their order.
        """

    def backward_multi(
        self,
        dy: Tensor,
        x: Tensor,
        output: Output[Tensor],
        batch: Sorted,
        mix: Mix,
        h: Tensor,
        needs_x: bool,
        wanted: Output[bool],
        seeds: Tensor | None,
    ) -> tuple[Tensor | None, Output[Tensor | None]]:
        """dx, if it is needed, and the gradients as wanted; None for an adapter without rows."""

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

    def dropout_mask(self, seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
        """The keep mask that a seed (int64, one element) makes: bool [rows, columns]."""

    def h_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """That of every h, for x of this dtype on this device.  It runs nothing."""

    def is_small(self, x: Tensor, outputs: Sequence[Output[Tensor]]) -> bool:
        """Whether a call is the faster for having no node."""

    def why_not(
        self, dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]
    ) -> str:
        """For the report: why a call with x of this dtype and device isn't covered; "" if it is.

        forward and backward take such a call all the same, by way of another backend.
        """
