"""PEFT's own layers of one x, for the time that they take."""

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

from ..projection import Output


def step_of(
    x: Tensor, outputs: Sequence[Output[Tensor]], dropout: float, dys: Sequence[Tensor]
) -> Callable[[], Any]:
    """Their forward while they train; with ``dys`` their backward, again and again."""
    layers = []
    for base, adapters in outputs:
        rows, columns = base.weight.shape
        how: Any = {"dtype": base.weight.dtype, "device": "meta"}
        linear = nn.Linear(columns, rows, bias=False, **how)
        linear.weight = nn.Parameter(base.weight, requires_grad=False)
        layer: Any = nn.Sequential(linear)
        for i, adapter in enumerate(adapters):
            r = len(adapter.lora_a)
            config = peft.LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout, target_modules=["0"])
            if i == 0:
                layer = peft.get_peft_model(layer, config, str(i))
            else:
                layer.add_adapter(str(i), config)
            (own,) = layer.base_model.model
            own.lora_A[str(i)].weight = nn.Parameter(adapter.lora_a)
            own.lora_B[str(i)].weight = nn.Parameter(adapter.lora_b)
        layer.base_model.set_adapter([str(i) for i in range(len(adapters))])
        layers.append(own.train())
    x = x.detach().requires_grad_()
    if not dys:
        return lambda: [layer(x) for layer in layers]
    ys = [layer(x) for layer in layers]
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(ys, [x, *trained], dys, retain_graph=True)
