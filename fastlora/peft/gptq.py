"""PEFT's LoRA layer over GPTQ-Model's layers, made fast."""

from peft.tuners.lora.gptq import GPTQLoraLinear as PeftGPTQLoraLinear
from torch import Tensor

from .layer import call


class GPTQLoraLinear(PeftGPTQLoraLinear):
    """As :class:`fastlora.peft.layer.Linear`: PEFT's layer of this name."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return call(self, super().forward, x, args, kwargs)


FAST = {PeftGPTQLoraLinear: GPTQLoraLinear}
