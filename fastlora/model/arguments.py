"""The arguments of the public functions: their kinds, and PEFT's config in place of ours."""

import os
from pathlib import Path

from torch import nn

from ..layers.adapted import LoRALayer
from ..layers.expert_layer import LoRAExperts
from ..layers.modules import called
from .adapter_config import from_live_peft
from .config import LoRAConfig


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless this is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {_kind(model)}, but must be a torch.nn.Module")


def check_plain(model: nn.Module) -> None:
    """Raise ValueError if a layer has an adapter, fastlora's or PEFT's."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer | LoRAExperts):
            raise ValueError(
                f"{called(name)} has an adapter already: call fastlora.remove_lora(model) first"
            )
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"{called(name)} has a PEFT adapter: merge it or unload it with PEFT first"
            )


def check_folder(folder: str | os.PathLike) -> Path:
    """The path; a TypeError if it is none."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder is {_kind(folder)}, but must be a path: a str or a pathlib.Path")
    return Path(folder)


def as_config(config: object) -> LoRAConfig:
    """A LoRAConfig, of ``peft.LoraConfig`` too, which is known by its ``peft_type``.

    Raises ValueError for PEFT's fields that fastlora hasn't, and TypeError for anything else.
    """
    if isinstance(config, LoRAConfig):
        return config
    if not isinstance(config, type) and hasattr(config, "peft_type"):
        return from_live_peft(config)
    hint = "; write fastlora.LoRAConfig(**config)" if isinstance(config, dict) else ""
    raise TypeError(
        f"config is {_kind(config)}, but must be a fastlora.LoRAConfig or a peft.LoraConfig, such "
        f'as fastlora.LoRAConfig(r=16, target_modules="all-linear"){hint}'
    )


def _kind(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    return f"of type {type(value).__name__}"
