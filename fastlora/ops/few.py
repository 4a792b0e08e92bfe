"""Calls of a few rows: operations that torch's autograd follows, in the place of our node.

There a call is all overhead, and a node of Python costs more than all of its products: 50 µs of a
training step of 110, measured at one row of 256.  The formula is the node's, and so is the mask.
What is kept for the backward is x and h; with dropout also the mask and the dropped x, as PEFT
keeps them, for to make the mask again would cost more than a row is worth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..backends import Settings


def few_rows(
    inputs: Sequence[Tensor], seeds: Tensor | None, settings: Settings
) -> tuple[Tensor, ...]:
    """The only output, with x's leading dimensions."""
    x, weight, *rest = inputs
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    ((has_bias, scales, _),), take = settings.layouts, iter(rest).__next__
    y = linear(rows, weight, take() if has_bias else None)
    dropped, keep = rows, 1.0 - settings.dropout
    for i, scale in enumerate(scales):
        lora_a, lora_b = take(), take()
        if seeds is not None:
            seed = seeds if len(scales) == 1 else seeds[i]
            mask = settings.backend.dropout_mask(seed, rows.shape, settings.dropout)
            dropped = rows * mask.to(rows.dtype)  # a mask of bool takes 1.4 times as long
        factor = float(scale) / keep
        if lora_a.dtype == y.dtype:
            y.addmm_(linear(dropped, lora_a), lora_b.t(), alpha=factor)
        else:  # float32 beside 16 bits: in float32, as in the node of few rows
            y.add_(linear(linear(dropped.to(lora_a.dtype), lora_a), lora_b), alpha=factor)
    if x.dim() == 2:
        return (y,)
    shape = *x.shape[:-1], y.shape[-1]
    # No view: hooks on one are lost when it is changed in place, and one made in no_grad can't be.
    return (torch.ops.aten._unsafe_view(y, shape) if y.requires_grad else y.resize_(shape),)
