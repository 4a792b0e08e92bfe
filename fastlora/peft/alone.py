"""PEFT's own layers of one x, with adapters of their own, for the time that they take."""

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn


def step_of(
    x: Tensor,
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    dropout: float,
    dys: Sequence[Tensor],
) -> Callable[[], Any]:
    """Their forward while they train; with ``dys`` their backward, again and again."""
    layers, x = [], x.detach().requires_grad_()
    for weight, r in zip(weights, ranks, strict=True):
        how: Any = {"bias": False, "dtype": weight.dtype, "device": "meta"}
        linear = nn.Linear(*weight.shape[::-1], **how)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        config = peft.LoraConfig(r=r, lora_dropout=dropout, target_modules=["0"])
        layers.append(peft.get_peft_model(nn.Sequential(linear), config).base_model.model.train())
    if not dys:
        return lambda: [layer(x) for layer in layers]
    ys = [layer(x) for layer in layers]
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(ys, [x, *trained], dys, retain_graph=True)
