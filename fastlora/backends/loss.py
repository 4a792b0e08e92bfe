"""Cross-entropy of a linear layer's output, chunk by chunk: no matrix [M, V] exists.

For the rows of a chunk, with z = x weightᵀ + h lora_bᵀ + bias [rows, V] and the target t of a row:

    s    = logit_scale · z, then softcap · tanh(s / softcap) if there is a softcap
    lse  = log Σ exp(s)
    loss = (1 - smoothing) · (lse - s_t) + smoothing · (lse - mean s) + z_loss · lse²
    g    = d loss / d z, written over z

The gradients of x, weight, bias and adapter are products with g, by the formulas of every layer
(:mod:`.formula`).  They are summed over the chunks in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call.projection import Output
from ..common.row_blocks import slices
from .dropout import DropoutMask
from .formula import OutputBackward, added, backward_rows, forward_rows, from_row, no_gradients
from .protocol import LossRows, LossSettings

# Bytes of a chunk of z.  On a CPU, chunks of 64 to 1024 rows take the same time for each row, with
# a vocabulary of 49,152.  Smaller chunks cost time, because each chunk widens or packs the weight
# again.  A GPU needs larger chunks to use all of its processors.
_CHUNK_ON_CPU, _CHUNK = 24 * 2**20, 512 * 2**20
_FEWEST_ROWS = 16


def loss_of_rows(
    x: Tensor,
    target: Tensor,
    output: Output[Tensor],
    masks: Sequence[DropoutMask | None],
    settings: LossSettings,
    row_loss: Callable[[LossRows], None],
    needs_x: bool,
    wanted: Output[bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Output[Tensor | None]]:
    """Each row's loss [M], dx, and the gradients of the output's tensors.

    x [M, K]; target int64 [M], each from 0 to V - 1; one mask for each adapter.  ``row_loss``: the
    backend's.  ``upstream`` [M]: the gradient of each row's loss, 1 if None.

    The losses and the output's gradients are in float32, or in float64 for float64.  A gradient is
    None unless ``needs_x`` or ``wanted`` asks for it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(len(x), dtype=wide)
    dx = x.new_empty(x.shape) if needs_x else None
    wants = needs_x or any([*wanted.base, *[need for a in wanted.adapters for need in a[:2]]])
    total = no_gradients(output)
    for rows, z, hs, masks_of_rows in _chunks(x, output, masks):
        row_upstream = None if upstream is None else upstream[rows]
        row_loss(LossRows(z, target[rows], losses[rows], settings, row_upstream, wants))
        if wants:
            dx_rows = None if dx is None else dx[rows]
            # row_loss has written g over z, and g is the dy of the head.
            asked = OutputBackward(z, output, hs, wanted, masks_of_rows)
            (part,) = backward_rows(x[rows], [asked], dx_rows)
            total = added(total, part, wide)
    return losses, dx, total


def reduced_rows(
    x: Tensor,
    output: Output[Tensor],
    masks: Sequence[DropoutMask | None],
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """``reduce`` of chunks of z [rows, V], which gives a number for each row: [M]."""
    return torch.cat([reduce(z) for _, z, _, _ in _chunks(x, output, masks)])


def _chunks(
    x: Tensor, output: Output[Tensor], masks: Sequence[DropoutMask | None]
) -> Iterator[tuple[slice, Tensor, Any, Any]]:
    """Chunks of z, one after another in the same memory: (rows, z, h of adapters, masks)."""
    M, V = len(x), output.base.weight.shape[0]
    step = _rows_of_chunk(M, V, x)
    buffer = x.new_empty(min(step, M), V)
    for rows in slices(M, step):
        x_rows, (masks_of_rows,) = x[rows], from_row([masks], rows.start)
        (z,), hs = forward_rows(x_rows, [output], [masks_of_rows], [buffer[: len(x_rows)]])
        yield rows, z, hs, masks_of_rows


def _rows_of_chunk(M: int, V: int, x: Tensor) -> int:
    """The number of rows of a chunk of z [M, V]."""
    size = _CHUNK_ON_CPU if x.is_cpu else _CHUNK
    return max(1, min(M, max(_FEWEST_ROWS, size // (V * x.element_size()))))
