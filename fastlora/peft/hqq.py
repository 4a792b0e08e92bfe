"""PEFT's LoRA layer over HQQ's layer, made fast.

PEFT has it where HQQ is installed, so that this is imported where that was already.
"""

from peft.tuners.lora import hqq
from torch import Tensor

from .layer import call


class HqqLoraLinear(hqq.HqqLoraLinear):
    """As :class:`fastlora.peft.layer.Linear`: PEFT's layer of this name."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return call(self, super().forward, x, args, kwargs)


FAST = {hqq.HqqLoraLinear: HqqLoraLinear}
