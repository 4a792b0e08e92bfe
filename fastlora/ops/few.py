"""Calls of a few rows: operations that torch's autograd follows, in the place of our node.

There a call is all overhead, and a node of Python costs more than all of its products: 50 µs of a
training step of 110, measured at one row of 256.  The formula and what is kept for the backward, x
and h, are the node's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..backends import find_backend
from ..projection import Output
from .autocast import autocast_is_on


def has_few_rows(x: Tensor, outputs: Sequence[Output[Tensor]]) -> bool:
    """Whether a call without dropout, whose tensors fit, is one of these now."""
    return (
        not torch.compiler.is_compiling()
        and not autocast_is_on(x.device.type)
        and find_backend(device=x.device).is_small(x, outputs)
    )


def few_rows(x: Tensor, outputs: Sequence[Output[Tensor]]) -> tuple[Tensor, ...]:
    """Every output, with x's leading dimensions."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    ys = []
    for (weight, bias), adapters in outputs:
        y = linear(rows, weight, bias)
        for lora_a, lora_b, scale in adapters:
            y.addmm_(linear(rows, lora_a), lora_b.t(), alpha=float(scale))
        ys.append(y if x.dim() == 2 else y.view(*x.shape[:-1], -1))
    return tuple(ys)
