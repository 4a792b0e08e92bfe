"""Dropout masks that the fast path and PEFT's share, so that their numbers can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ...backends import find_backend
from ...ops.functional import draw_seed


class SeededDropout(nn.Dropout):
    """``nn.Dropout`` with the mask that fastlora's ops would make of the same random state."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        seed = draw_seed(1, x.device)
        rows = x.numel() // x.shape[-1]
        mask = find_backend(device=x.device).dropout_mask(seed, (rows, x.shape[-1]), self.p)
        return x * mask.reshape(x.shape).to(x.dtype) / (1.0 - self.p)


DROPOUTS = (nn.Dropout, nn.Identity, SeededDropout)


@contextmanager
def shared_masks(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT's own forward drops what the fast path would drop after the same manual_seed."""
    swapped = []
    for layer in model.modules():
        for dropout in layer.lora_dropout.values() if isinstance(layer, LoraLayer) else ():
            if type(dropout) is nn.Dropout:
                dropout.__class__ = SeededDropout
                swapped.append(dropout)
    try:
        yield
    finally:
        for dropout in swapped:
            dropout.__class__ = nn.Dropout
