"""The dropouts that the fast path knows: PEFT's, and the seeded one that compares with it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..backends.dropout import dropout_mask
from ..ops.door import draw_seed


class Seeds:
    """A layer's seeds, drawn at once for all its active adapters, as ``lora_linears`` does.

    On a GPU one draw of two numbers isn't two draws of one.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._left: list[Tensor] = []

    def next(self, device: torch.device) -> Tensor:
        if not self._left:
            dropouts = self._layer.lora_dropout
            active = [dropouts[name] for name in self._layer.active_adapters if name in dropouts]
            count = sum(isinstance(d, SeededDropout) and d.drops() for d in active)
            self._left = list(draw_seed(max(1, count), device).split(1))
        return self._left.pop(0)


class SeededDropout(nn.Dropout):
    """``nn.Dropout`` with the mask that fastlora's ops would make of the same random state."""

    seeds: Seeds

    def forward(self, x: Tensor) -> Tensor:
        if not self.drops():
            return x
        seed = self.seeds.next(x.device)
        rows = x.numel() // x.shape[-1]
        mask = dropout_mask(seed, (rows, x.shape[-1]), self.p)
        return x * mask.reshape(x.shape).to(x.dtype) / (1.0 - self.p)

    def drops(self) -> bool:
        return self.training and self.p > 0.0


DROPOUTS = (nn.Dropout, nn.Identity, SeededDropout)
