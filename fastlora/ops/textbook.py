"""The formula by torch's own operations, which everything of torch's can follow."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import dropout, linear

from ..formats.format import Quantised
from ..projection import Output


def needs_textbook(x: Tensor) -> bool:
    """Whether x, or what is done with the call, is nothing that the node can follow.

    A nested tensor, a transform of ``torch.func``, forward-mode differentiation, ``jit.trace``.
    """
    return (
        x.is_nested
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def textbook(x: Tensor, outputs: Sequence[Output[Tensor]], p: float) -> tuple[Tensor, ...]:
    """Every output of x, which may be nested; a mask of torch's own for each adapter."""
    ys = []
    for (weight, bias), adapters in outputs:
        if isinstance(weight, Quantised):
            weight = weight.dense(x.dtype)
        y = linear(x, weight, None if bias is None else bias.to(weight.dtype))
        for lora_a, lora_b, scale in adapters:
            dropped = dropout(x, p) if p else x
            lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
            # lora_a is scaled, since that is never nested.
            y = y + linear(linear(dropped, scale * lora_a), lora_b)
        ys.append(y)
    return tuple(ys)
