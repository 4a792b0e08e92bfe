"""PEFT's LoRA layers over bitsandbytes' layers, made fast.

Importing PEFT's module imports bitsandbytes, so that this is imported where that was already.
"""

from peft.tuners.lora import bnb
from torch import Tensor

from .layer import call


class Linear4bit(bnb.Linear4bit):
    """As :class:`fastlora.peft.layer.Linear`: PEFT's ``lora.bnb.Linear4bit``."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return call(self, super().forward, x, args, kwargs)


class Linear8bitLt(bnb.Linear8bitLt):
    """As :class:`fastlora.peft.layer.Linear`: PEFT's ``lora.bnb.Linear8bitLt``."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return call(self, super().forward, x, args, kwargs)


FAST = {bnb.Linear4bit: Linear4bit, bnb.Linear8bitLt: Linear8bitLt}
