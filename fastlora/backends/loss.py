"""Cross-entropy of a linear layer's output, chunk by chunk: no matrix [M, V] exists.

For the rows of a chunk, with z = x weightᵀ + h lora_bᵀ + bias [rows, V] and the target t of a row:

    s    = logit_scale · z, then softcap · tanh(s / softcap) if there is a softcap
    lse  = log Σ exp(s)
    loss = (1 - smoothing) · (lse - s_t) + smoothing · (lse - mean s) + z_loss · lse²
    g    = d loss / d z, written over z

The gradients of x, weight, bias and adapter are products with g, by the formulas of every layer
(:mod:`.formula`).  They are summed over the chunks in float32.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..projection import Output
from .dropout import DropoutMask
from .formula import OutputBackward, added, backward_rows, forward_rows, from_row, no_gradients
from .protocol import LossSettings

# Bytes of a chunk of z.  On a CPU, 64 to 1024 rows of 49,152 words take the same time; fewer rows
# widen or pack the weight more often.  A GPU needs more rows to fill its products.
_CHUNK_ON_CPU, _CHUNK = 24 * 2**20, 512 * 2**20
_FEWEST_ROWS = 16


# Fills row losses [rows] of logits [rows, V] and targets [rows]; with ``gradient`` writes g over
# the logits, times each row's number in ``upstream``, if given.
RowLoss = Callable[[Tensor, Tensor, Tensor, LossSettings, Tensor | None, bool], None]


class LossGradients(NamedTuple):
    """Gradients of the sum of all rows' losses; of each tensor that was asked for, else None."""

    dx: Tensor | None
    output: Output[Tensor | None]  # in float32, or in float64 for float64


def loss_of_rows(
    x: Tensor,
    target: Tensor,
    output: Output[Tensor],
    masks: Sequence[DropoutMask | None],
    settings: LossSettings,
    row_loss: RowLoss,
    needs_x: bool,
    wanted: Output[bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor, LossGradients]:
    """Each row's loss [M], in float32 or wider, and the gradients.

    x [M, K]; target int64 [M], each from 0 to V - 1; one mask for each adapter.  ``upstream`` [M]:
    the gradient of each row's loss, 1 if None.
    """
    M, V, wide = len(x), output.base.weight.shape[0], torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(M, dtype=wide)
    dx = x.new_empty(x.shape) if needs_x else None
    wants = needs_x or any([*wanted.base, *[need for a in wanted.adapters for need in a[:2]]])
    total = no_gradients(output)
    step = _rows_of_chunk(M, V, x)
    buffer = x.new_empty(min(step, M), V)
    for first in range(0, M, step):
        rows = slice(first, min(M, first + step))
        x_rows, of_rows = x[rows], from_row([masks], first)
        (z,), hs = forward_rows(x_rows, [output], of_rows, [buffer[: len(x_rows)]])
        row_upstream = None if upstream is None else upstream[rows]
        row_loss(z, target[rows], losses[rows], settings, row_upstream, wants)
        if wants:
            dx_rows = None if dx is None else dx[rows]
            asked = OutputBackward(z, output, hs, wanted, of_rows[0])
            (part,) = backward_rows(x_rows, [asked], dx_rows)
            total = added(total, part, wide)
    return losses, LossGradients(dx, total)


def _rows_of_chunk(M: int, V: int, x: Tensor) -> int:
    size = _CHUNK_ON_CPU if x.is_cpu else _CHUNK
    return max(1, min(M, max(_FEWEST_ROWS, size // (V * x.element_size()))))
