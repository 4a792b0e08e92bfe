"""PEFT's ``adapter_config.json``, to and from a LoRAConfig.  It imports nothing of PEFT."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from .config import LoRAConfig

_OURS = {field.name for field in fields(LoRAConfig)}
# Settings that say nothing of the layers' arithmetic, or that say it only together with a switch
# which is refused.
_SILENT = {
    "auto_mapping",
    "ensure_weight_tying",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
}


def to_peft(
    config: LoRAConfig, targets: Iterable[str] | str, base_name: str | None
) -> dict[str, Any]:
    """The JSON object that PEFT reads, with the targets spelled out."""
    values = {name: getattr(config, name) for name in _OURS}
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = dict(values[name])  # in its order: the first pattern that matches counts
    for name in ("exclude_modules", "modules_to_save"):
        if isinstance(values[name], tuple):
            values[name] = list(values[name])
    values |= {
        "peft_type": "LORA",
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "base_model_name_or_path": config.base_model_name_or_path or base_name,
        "init_lora_weights": True,  # the file's weights replace whatever a loader initialises
        "inference_mode": True,
        "fan_in_fan_out": False,
        "lora_bias": False,
        "use_dora": False,
    }
    return dict(sorted(values.items()))


def from_peft(values: Mapping[str, Any], source: str) -> LoRAConfig:
    """The LoRAConfig of a JSON object of PEFT's.

    A setting that fastlora hasn't is a ValueError that names it, unless it is off (null, false, or
    empty).
    """
    if not isinstance(values, Mapping) or "peft_type" not in values:
        raise ValueError(f"{source} is no PEFT config: it has no peft_type")
    if values["peft_type"] != "LORA":
        raise ValueError(
            f"{source} has peft_type {values['peft_type']!r}, and fastlora loads only 'LORA': "
            "use PEFT"
        )
    foreign = {
        name: value
        for name, value in values.items()
        if name not in _OURS | _SILENT and not _is_off(value)
    }
    if foreign:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(foreign.items()))
        raise ValueError(
            f"{source} has settings that fastlora doesn't support: {settings}. Load it with PEFT"
        )
    ours = {name: value for name, value in values.items() if name in _OURS}
    if ours.get("init_lora_weights") not in (None, True, False, "gaussian"):
        raise ValueError(
            f"{source} has init_lora_weights={ours['init_lora_weights']!r}, which changes the base "
            "weights too: load it with PEFT and save it converted "
            "(path_initial_model_for_weight_conversion)"
        )
    ours["init_lora_weights"] = True
    ours.setdefault("lora_alpha", 8)  # PEFT's default
    for name in ("rank_pattern", "alpha_pattern"):
        ours[name] = ours.get(name) or {}
    try:
        return LoRAConfig(**ours)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} doesn't hold a LoRA config: {error}") from None


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def short_targets(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The last parts of the layers' names if they mean no other module, else the whole names."""
    layers = set(layers)
    last_parts = {name.rpartition(".")[2] for name in layers}
    same_ending = {
        name for name, _ in model.named_modules() if name.rpartition(".")[2] in last_parts
    }
    return sorted(last_parts if same_ending == layers else layers)
