"""PEFT's own forward as the baseline, with fastlora's dropout masks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from ..backends.dropout import dropout_mask
from ..layers.classes import changed_classes
from ..ops.node import draw_seed
from .tensor_parallel import part_of


class SeededDropout(nn.Dropout):
    """``nn.Dropout`` with the mask that fastlora's ops would draw from the same random state.

    A layer draws the seeds of all its active adapters at once, like ``lora_linears``, because on a
    GPU one draw of two numbers gives other numbers than two draws.
    """

    layer: LoraLayer
    seeds: list[Tensor]  # drawn for the layer and not used yet; shared by its dropouts

    def forward(self, x: Tensor) -> Tensor:
        if not self.drops():
            return x
        if not self.seeds:
            dropouts = self.layer.lora_dropout
            names = [name for name in self.layer.active_adapters if name in dropouts]
            active = [dropouts[name] for name in names]
            count = sum(isinstance(d, SeededDropout) and d.drops() for d in active)
            _, part = part_of(self.layer, names)
            draw = draw_seed if part is None else part.seeds
            self.seeds += draw(max(1, count), x.device).split(1)
        shape = x.numel() // x.shape[-1], x.shape[-1]
        mask = dropout_mask(self.seeds.pop(0), shape, self.p)
        return x * mask.reshape(x.shape).to(x.dtype) / (1.0 - self.p)

    def drops(self) -> bool:
        return self.training and self.p > 0.0


# The classes of dropout that the fast path supports.
DROPOUTS = (nn.Dropout, nn.Identity, SeededDropout)


@contextmanager
def shared_masks(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT's forward draws the dropout masks that fastlora draws after the same seed.

    The dropout of experts is off, because PEFT has none there.
    """
    changed: dict[nn.Module, Any] = {}
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        seeds: list[Tensor] = []
        for dropout in layer.lora_dropout.values():
            if isinstance(layer, ParamWrapper):
                changed[dropout] = nn.Identity
            elif type(dropout) is nn.Dropout:
                dropout.__dict__ |= {"layer": layer, "seeds": seeds}
                changed[dropout] = SeededDropout
    try:
        with changed_classes(changed):
            yield
    finally:
        for dropout in changed:
            for name in ("layer", "seeds"):
                dropout.__dict__.pop(name, None)
