"""The interface of a backend, which ``torch`` and ``triton`` implement, and its functions' records.

A backend is a module with these functions.  They mean the same on every backend.  :mod:`.torch`
states the formulas, and :mod:`.formula` computes them.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..projection import Layout, Output
from ..rows import Rows


class Call(NamedTuple):
    """Everything about a call except its tensors."""

    layouts: tuple[Layout, ...]  # one for each output
    dropout: float  # the probability of dropping an input, in [0, 1); 0 in evaluation
    backend: "Backend"
    rows: Rows | None = None  # how x's rows are cut into segments; None: they aren't
    # Launches that the backend captured for a forward with inputs of these shapes, strides, dtypes,
    # devices and addresses modulo 16; None where they may differ from call to call.
    captured: dict | None = None
    is_few: bool = False  # has so few rows that torch's autograd records it, without a node
    seeds: int = 0  # of dropout, that each eager call draws
    autocasts: bool = False  # whether x and the weights are cast to autocast's dtype


class BackwardCall(NamedTuple):
    """A call in the backward, with its tensors."""

    dys: Sequence[Tensor | None]  # [M, N] for each output; None if the loss doesn't use it
    inputs: Sequence[Tensor]
    hs: Sequence[Tensor | None]  # from the forward; None if no gradient reads it
    needs: Sequence[bool]  # for each input: whether its gradient is needed
    seeds: Tensor | None
    call: Call


class GatedProduct(NamedTuple):
    """The middle of a gated MLP: act(gate) ∘ up."""

    gate: Tensor  # [M, N], with contiguous rows
    up: Tensor  # the same
    activation: str  # a key of ``gated.ACTIVATIONS``
    # Compute 16-bit matrices in float32 and round the result once.  Otherwise a backend may round
    # each step.
    wide: bool = False


class LossSettings(NamedTuple):
    """The numbers of a loss's formulas (:mod:`.loss`)."""

    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0


class LossRows(NamedTuple):
    """Rows of logits, and the tensors that their losses need (formulas in :mod:`.loss`)."""

    z: Tensor  # the logits [rows, V]
    target: Tensor  # int64 [rows], the class of each row
    losses: Tensor  # [rows], to be filled, float32 or wider
    settings: LossSettings
    upstream: Tensor | None = None  # [rows], the gradient of each row's loss; None: 1
    gradient: bool = False  # whether z is overwritten with its gradient

    def part(self, rows: slice) -> "LossRows":
        """The record of some of the rows."""
        upstream = None if self.upstream is None else self.upstream[rows]
        tensors = self.z[rows], self.target[rows], self.losses[rows]
        return LossRows(*tensors, self.settings, upstream, self.gradient)


class Backend(Protocol):
    """The functions of a backend.

    ``inputs`` are x [M, K] and the tensors of the outputs, flat, in the order of the layouts.
    ``seeds`` are int64 [number of adapters], on the device of x; None without dropout.  With
    experts, one seed makes the mask of all rows.  With many adapters, each adapter has its own
    seed, whose mask covers only the rows of this adapter, in their order.
    """

    def forward(
        self, inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
    ) -> tuple[list[Tensor], list[Tensor]]:
        """y [M, N] of every output; and a flat list with the h [M, r] of every adapter.

        Many adapters share one h, [M, the largest r], with its rows in sorted order.  Rows of y
        that belong to no expert are zero, and those rows of x change no result.  If the kernels
        cover a call, neither forward nor backward makes the host wait for the GPU.  The weights and
        biases of experts don't train.
        """

    def backward(self, given: BackwardCall) -> list[Tensor | None]:
        """The gradient of each input, or None if ``needs`` has False for it.

        With many adapters, an adapter without rows may get None.
        """

    def takes_experts_in_turn(self, device: torch.device) -> bool:
        """Whether one call for many experts takes at least as long as a call for each expert.

        If so, a caller may split the experts over several calls.
        """

    def gated(self, product: GatedProduct) -> Tensor:
        """act(gate) ∘ up, [M, N], contiguous."""

    def gated_backward(
        self, dy: Tensor, product: GatedProduct, d_gate: Tensor, d_up: Tensor
    ) -> None:
        """Fill d_gate = act'(gate) ∘ dy ∘ up and d_up = dy ∘ act(gate).  d_gate may be dy."""

    def row_loss(self, rows: LossRows) -> None:
        """Fill the losses of these rows, and overwrite z if ``rows.gradient``.

        z then becomes d loss / d z of each row, times the row's number in ``upstream``.
        """

    def dropout_mask(self, seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
        """The keep mask for a seed (int64, one element): bool [rows, columns]."""

    def h_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of every h, for x of this dtype on this device.  It launches nothing."""

    # The name of the backend that runs the calls that this one doesn't cover.
    HANDS_TO: str

    def why_not(
        self, dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]
    ) -> str:
        """Why this backend doesn't cover a call with such an x, for reports; "" if it does.

        forward and backward also take calls that aren't covered, and run them on ``HANDS_TO``.
        """
