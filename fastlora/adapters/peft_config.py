"""Convert PEFT's ``adapter_config.json`` to an AdapterConfig.  PEFT is not imported."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..common.text import shown
from .config import AdapterConfig

_OURS = {field.name for field in fields(AdapterConfig)}
# Settings of an initialization of lora_A and lora_B; PEFT reads them only when it makes an adapter.
_INIT_ONLY = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
# Settings that don't change the meaning of the tensors.  megatron_core and qalora_group_size do so
# only together with megatron_config and use_qalora, which raise an error.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "revision", "target_modules", "task_type",
    "fan_in_fan_out",  # the layer's class decides, as in PEFT
} | _INIT_ONLY  # fmt: skip
# Initializations that change only lora_A and lora_B, which the file's values replace.
_REPLACED_BY_THE_FILE = (None, True, False, "gaussian", "eva", "orthogonal")


def as_trained(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings without the initialization of lora_A and lora_B.

    A loader replaces the initial values anyway, and PEFT would refuse an odd rank for "orthogonal".
    """
    return {k: v for k, v in values.items() if k not in _INIT_ONLY} | {"init_lora_weights": True}


def from_peft(values: Mapping[str, Any], source: str) -> AdapterConfig:
    """The AdapterConfig of PEFT's JSON object.  Raises ValueError for an unsupported setting.

    ``source`` names the object in errors.
    """
    if values["peft_type"] != "LORA":
        raise ValueError(
            f"{source} has peft_type {values['peft_type']!r}, and fastlora has only 'LORA': load "
            "it with PEFT"
        )
    foreign = sorted(values.keys() - _OURS - _SILENT)
    # Unknown settings of a newer PEFT pass if they are off: None, False or empty.
    on = [n for n in foreign if not (values[n] in (None, "", [], {}) or values[n] is False)]
    if on:
        settings = ", ".join(f"{name}={shown(values[name])}" for name in on)
        raise ValueError(
            f"{source} has settings that fastlora doesn't support: {settings}. Load it with PEFT"
        )
    if any(str(name).endswith("weight") for name in values.get("target_parameters") or ()):
        raise ValueError(
            f"{source} names a layer's weight in target_parameters, and fastlora reads only "
            "experts' parameters there: load it with PEFT"
        )
    version = values.get("peft_version")
    numbers = re.match(r"(\d+)\.(\d+)\.?(\d*)", version if isinstance(version, str) else "")
    is_older = numbers and tuple(int(number or 0) for number in numbers.groups()) < (0, 19, 1)
    if is_older and values.get("target_parameters"):
        raise ValueError(
            f"{source} has adapters of experts that PEFT {version} saved with in and out features "
            "swapped: fastlora reads adapters of experts from PEFT 0.19.1 or newer"
        )
    init = values.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _REPLACED_BY_THE_FILE:
        raise ValueError(
            f"{source} has init_lora_weights={init!r}, which changes the base weights too, or is "
            "unknown: load it with PEFT and save it converted "
            "(path_initial_model_for_weight_conversion)"
        )
    return config_of(values, source)


def config_of(values: Mapping[str, Any], source: str) -> AdapterConfig:
    """The settings that the tensors' meaning depends on, without a check of the others."""
    ours = {name: value for name, value in values.items() if name in _OURS}
    for name in ("rank_pattern", "alpha_pattern"):
        ours[name] = ours.get(name) or {}
    try:
        return AdapterConfig(**ours)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{source} doesn't hold a LoRA config: {error}") from None
