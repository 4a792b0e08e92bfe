"""PEFT's LoRA layer over a weight that is a torchao tensor, made fast."""

from peft.tuners.lora.torchao import TorchaoLoraLinear as PeftTorchaoLoraLinear
from torch import Tensor

from .layer import call


class TorchaoLoraLinear(PeftTorchaoLoraLinear):
    """As :class:`fastlora.peft.layer.Linear`: PEFT's layer of this name."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return call(self, super().forward, x, args, kwargs)


FAST = {PeftTorchaoLoraLinear: TorchaoLoraLinear}
