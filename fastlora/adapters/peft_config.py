"""Convert PEFT's ``adapter_config.json`` to and from a AdapterConfig.  PEFT is not imported."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..text import shown
from .config import AdapterConfig

_OURS = {field.name for field in fields(AdapterConfig)}
# Ignored settings.  Most don't affect the layers' arithmetic.  megatron_core and qalora_group_size
# affect it only together with megatron_config and use_qalora, which raise an error.
_SILENT = {
    "auto_mapping", "ensure_weight_tying", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision",
    "fan_in_fan_out",  # the layer's class decides, as in PEFT
}  # fmt: skip
# Settings of an initialization of lora_A and lora_B; PEFT reads them only when it makes an adapter.
_INIT_ONLY = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
# Initializations that change only lora_A and lora_B, which the file's values replace.
_REPLACED_BY_THE_FILE = ("gaussian", "eva", "orthogonal")
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def as_trained(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings without the initialization of lora_A and lora_B.

    A loader replaces the initial values anyway, and PEFT would refuse an odd rank for "orthogonal".
    """
    return {k: v for k, v in values.items() if k not in _INIT_ONLY} | {"init_lora_weights": True}


def from_peft(values: Mapping[str, Any], source: str) -> AdapterConfig:
    """The AdapterConfig of PEFT's JSON object.  Raises ValueError for an unsupported setting.

    ``source`` names the object in errors.
    """
    ours = _ours(values, source, "Load it with PEFT")
    version = values.get("peft_version")
    numbers = re.match(r"(\d+)\.(\d+)\.?(\d*)", version if isinstance(version, str) else "")
    is_older = numbers and tuple(int(number or 0) for number in numbers.groups()) < (0, 19, 1)
    if is_older and ours.get("target_parameters"):
        raise ValueError(
            f"{source} has adapters of experts that PEFT {version} saved with in and out features "
            "swapped: fastlora reads adapters of experts from PEFT 0.19.1 or newer"
        )
    init = ours.get("init_lora_weights")
    word = init.lower() if isinstance(init, str) else init
    if isinstance(word, str) and word.startswith(_CHANGING_THE_BASE):
        raise ValueError(
            f"{source} has init_lora_weights={init!r}, which changes the base "
            "weights too: load it with PEFT and save it converted "
            "(path_initial_model_for_weight_conversion)"
        )
    if word not in (None, True, False, *_REPLACED_BY_THE_FILE):
        raise ValueError(
            f"{source} has init_lora_weights={init!r}, which fastlora doesn't support: load it "
            "with PEFT"
        )
    ours["init_lora_weights"] = True
    return config_of(ours, source)


def _ours(values: Mapping[str, Any], source: str, what_else: str) -> dict[str, Any]:
    """AdapterConfig's fields among PEFT's.

    Raises ValueError for another method than LoRA and for unsupported settings; ``what_else`` ends
    the message with the next step.
    """
    if not isinstance(values, Mapping) or "peft_type" not in values:
        raise ValueError(f"{source} is not a PEFT config: it has no peft_type")
    if values["peft_type"] != "LORA":
        raise ValueError(
            f"{source} has peft_type {values['peft_type']!r}, and fastlora has only 'LORA'. "
            f"{what_else}"
        )
    foreign = sorted(values.keys() - _OURS - _SILENT - _INIT_ONLY)
    # Unknown settings of a newer PEFT pass if they are off: None, False or empty.
    on = [n for n in foreign if not (values[n] in (None, "", [], {}) or values[n] is False)]
    if on:
        settings = ", ".join(f"{name}={shown(values[name])}" for name in on)
        raise ValueError(
            f"{source} has settings that fastlora doesn't support: {settings}. {what_else}"
        )
    return {name: value for name, value in values.items() if name in _OURS}


def config_of(ours: dict[str, Any], source: str) -> AdapterConfig:
    ours.setdefault("lora_alpha", 8)  # PEFT's default
    for name in ("rank_pattern", "alpha_pattern"):
        ours[name] = ours.get(name) or {}
    try:
        return AdapterConfig(**ours)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} doesn't hold a LoRA config: {error}") from None
