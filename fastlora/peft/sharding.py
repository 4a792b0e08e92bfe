"""PEFT's layers under FSDP: which are whole when they are called, and what to say of the others."""

from collections.abc import Sequence

from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from ..gather import is_flattened
from ..modules import plain_name, some


class Units:
    """The modules of a model that FSDP2 gathers, and the layers that FSDP1 does."""

    def __init__(self, model: nn.Module) -> None:
        modules = model.named_modules()
        self._names = [plain_name(name) for name, m in modules if isinstance(m, FSDPModule)]

    def gather(self, name: str, layer: LoraLayer) -> bool:
        """Whether the layer's parameters, sharded between calls, will be whole in its call."""
        if any(not unit or f"{name}.".startswith(f"{unit}.") for unit in self._names):
            return True
        return any(is_flattened(parameter) for parameter in layer.parameters())


def wrapping_notes(layers: Sequence[tuple[str, LoraLayer]]) -> tuple[str, ...]:
    """On layers whose adapters FSDP1 wraps one by one, as PEFT's policy for it does."""
    names = [
        name
        for name, layer in layers
        if any(isinstance(part, FullyShardedDataParallel) for part in layer.lora_A.values())
    ]
    if not names:
        return ()
    return (
        f"{some(names)}: FSDP wraps lora_A and lora_B by themselves: PEFT's fsdp_auto_wrap_policy "
        "does, and transformers' Trainer takes it for every PEFT model.  FSDP2 (in fsdp_config "
        '"version": 2) doesn\'t, nor does a policy of whole blocks with use_orig_params=True',
    )
