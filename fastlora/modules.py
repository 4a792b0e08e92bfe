"""Walking a model: its LoRA layers, what is wrapped around it, and names for messages."""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .layer import LoRALinear


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRALinear of the model, with its name."""
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model that apply_lora was called on, inside ``torch.compile``, DDP and the like."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile's
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"


def called(name: str) -> str:
    """A module's name for a message; the model itself has none."""
    return name or "the model"
