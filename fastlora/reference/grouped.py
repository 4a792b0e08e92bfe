"""Experts, each with a LoRA layer of its own, written as they are read: a loop over the experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import lora_linear


def lora_grouped(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor | Sequence[int],
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Rows sorted by expert, each through its expert's layer; differentiable in every tensor.

    x [S, K], weight [E, N, K], lora_a [E, r, K], lora_b [E, N, r], bias [E, N] -> [S, N], all in
    one dtype.  ``offsets`` [E] has the end of each expert's rows.  Rows behind the last end are
    nobody's: their outputs are zero, and nothing depends on what they hold.

    Dropout comes as an explicit ``mask`` [S, K], as for :func:`lora_linear`.
    """
    ends = [int(end) for end in offsets]
    ys, start = [], 0
    for e, end in enumerate(ends):
        ys.append(
            lora_linear(
                x[start:end],
                weight[e],
                lora_a[e],
                lora_b[e],
                bias=None if bias is None else bias[e],
                scale=scale,
                dropout=dropout,
                mask=None if mask is None else mask[start:end],
            )
        )
        start = end
    ys.append(x.new_zeros(len(x) - start, weight.shape[1]))
    return torch.cat(ys)
