"""Dropout masks that the fast path and PEFT's share, so that their numbers can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..backends.dropout import dropout_mask
from ..ops.door import draw_seed


class Seeds:
    """A layer's seeds, drawn at once for all its active adapters, as ``lora_linears`` does.

    On a GPU one draw of two numbers isn't two draws of one.
    """

    def __init__(self, layer: LoraLayer) -> None:
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


# Those that the fast path knows.
DROPOUTS = (nn.Dropout, nn.Identity, SeededDropout)


@contextmanager
def shared_masks(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT's own forward drops what the fast path would drop after the same manual_seed."""
    swapped = []
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        seeds = Seeds(layer)
        for dropout in layer.lora_dropout.values():
            if type(dropout) is nn.Dropout:
                dropout.__class__ = SeededDropout
                dropout.__dict__["seeds"] = seeds
                swapped.append(dropout)
    try:
        yield
    finally:
        for dropout in swapped:
            dropout.__class__ = nn.Dropout
            del dropout.seeds
