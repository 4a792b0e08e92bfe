"""Dropout masks that the fast path and PEFT's share, so that their numbers can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..backends.dropout import dropout_mask
from ..ops.door import draw_seed


class SeededDropout(nn.Dropout):
    """``nn.Dropout`` with the mask that fastlora's ops would make of the same random state.

    A layer's seeds are drawn at once for all its active adapters, as ``lora_linears`` does: on a
    GPU one draw of two numbers isn't two draws of one.
    """

    layer: LoraLayer
    seeds: list[Tensor]  # the layer's, drawn and not taken as yet

    def forward(self, x: Tensor) -> Tensor:
        if not self.drops():
            return x
        if not self.seeds:
            dropouts = self.layer.lora_dropout
            active = [dropouts[name] for name in self.layer.active_adapters if name in dropouts]
            count = sum(isinstance(d, SeededDropout) and d.drops() for d in active)
            self.seeds += draw_seed(max(1, count), x.device).split(1)
        rows = x.numel() // x.shape[-1]
        mask = dropout_mask(self.seeds.pop(0), (rows, x.shape[-1]), self.p)
        return x * mask.reshape(x.shape).to(x.dtype) / (1.0 - self.p)

    def drops(self) -> bool:
        return self.training and self.p > 0.0


# Those that the fast path knows.
DROPOUTS = (nn.Dropout, nn.Identity, SeededDropout)


@contextmanager
def shared_masks(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT's own forward drops what the fast path would drop after the same manual_seed."""
    swapped = []
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        seeds: list[Tensor] = []
        for dropout in layer.lora_dropout.values():
            if type(dropout) is nn.Dropout:
                dropout.__class__ = SeededDropout
                dropout.__dict__ |= {"layer": layer, "seeds": seeds}
                swapped.append(dropout)
    try:
        yield
    finally:
        for dropout in swapped:
            dropout.__class__ = nn.Dropout
            del dropout.__dict__["layer"], dropout.__dict__["seeds"]
