"""PEFT's ``adapter_config.json``, to and from a LoRAConfig.  It imports nothing of PEFT."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from ..projection import shown
from .config import LoRAConfig, kind_of

_OURS = {field.name for field in fields(LoRAConfig)}
# Settings that say nothing of the layers' arithmetic, or that say it only together with a switch
# which is refused.
_SILENT = {
    "auto_mapping", "ensure_weight_tying", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision",
    "fan_in_fan_out",  # the layers' class tells, in PEFT too
}  # fmt: skip
# What PEFT reads only with that init_lora_weights, as lora_A and lora_B begin.
_AT_FIRST = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
# How lora_A and lora_B began, which the file's values replace.
_REPLACED_BY_THE_FILE = ("gaussian", "eva", "orthogonal")
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def to_peft(config: LoRAConfig, base_name: str | None, fan_in_fan_out: bool) -> dict[str, Any]:
    """The JSON object that PEFT reads; ``fan_in_fan_out``: the layers' weights are [in, out]."""
    values = {name: getattr(config, name) for name in _OURS}
    for name, value in values.items():
        if isinstance(value, tuple | Mapping):  # in its order: the first pattern counts
            values[name] = list(value) if isinstance(value, tuple) else dict(value)
    if isinstance(config.target_modules, tuple):
        values["target_modules"] = sorted(config.target_modules)
    if config.target_parameters and config.lora_dropout:
        warnings.warn(
            f"the file has lora_dropout 0 in place of {config.lora_dropout}: PEFT can't drop "
            "inputs of layers in target_parameters, and reads the targets of a mixture of experts "
            "right in no other form. Inference is the same; to train on in a new model, set "
            "lora_dropout again",
            stacklevel=3,
        )
        values["lora_dropout"] = 0.0
    values |= {
        "peft_type": "LORA",
        "base_model_name_or_path": config.base_model_name_or_path or base_name,
        "inference_mode": True,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_bias": False,
        "use_dora": False,
    }
    return dict(sorted(as_trained(values).items()))


def as_trained(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, but for how lora_A and lora_B began.

    The file's values replace whatever a loader initializes, and PEFT would refuse an odd rank to
    begin "orthogonal".
    """
    return {k: v for k, v in values.items() if k not in _AT_FIRST} | {"init_lora_weights": True}


def from_peft(values: Mapping[str, Any], source: str) -> LoRAConfig:
    """The LoRAConfig of PEFT's JSON object; ValueError for a setting that fastlora hasn't."""
    ours = _ours(values, source, "Load it with PEFT")
    version = values.get("peft_version")
    numbers = re.match(r"(\d+)\.(\d+)\.?(\d*)", version if isinstance(version, str) else "")
    is_older = numbers and tuple(int(number or 0) for number in numbers.groups()) < (0, 19, 1)
    if is_older and ours.get("target_parameters"):
        raise ValueError(
            f"{source} has adapters of experts that PEFT {version} saved, which had in and out "
            "swapped: fastlora reads those of PEFT 0.19.1 and newer"
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
            f"{source} has init_lora_weights={init!r}, which fastlora doesn't know: load it with "
            "PEFT"
        )
    ours["init_lora_weights"] = True
    return _config(ours, source)


def as_config(config: object) -> LoRAConfig:
    """A LoRAConfig, of ``peft.LoraConfig`` too, which is known by its ``peft_type``.

    Raises ValueError for PEFT's fields that fastlora hasn't, and TypeError for anything else.
    """
    if isinstance(config, LoRAConfig):
        return config
    if not isinstance(config, type) and hasattr(config, "peft_type"):
        return _from_live_peft(config)
    hint = "; write fastlora.LoRAConfig(**config)" if isinstance(config, dict) else ""
    raise TypeError(
        f"config is {kind_of(config)}, but must be a fastlora.LoRAConfig or a peft.LoraConfig, "
        f'such as fastlora.LoRAConfig(r=16, target_modules="all-linear"){hint}'
    )


def _from_live_peft(config: Any) -> LoRAConfig:
    """The LoRAConfig of a ``peft.LoraConfig``; ValueError as from_peft, where it means more."""
    source = f"the peft.{type(config).__name__}"
    values = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in config.to_dict().items()
    }
    ours = _ours(values, source, "Use PEFT, and fastlora.optimize on its model")
    if ours.get("target_modules") is None and not ours.get("target_parameters"):
        raise ValueError(
            f"{source} has no target_modules, which PEFT looks up in a table of its own: name the "
            'layers, such as target_modules=["q_proj", "v_proj"] or "all-linear"'
        )
    return _config(ours, source)


def _ours(values: Mapping[str, Any], source: str, what_else: str) -> dict[str, Any]:
    """Our fields of PEFT's; ValueError for another method, or settings that fastlora hasn't."""
    if not isinstance(values, Mapping) or "peft_type" not in values:
        raise ValueError(f"{source} is no PEFT config: it has no peft_type")
    if values["peft_type"] != "LORA":
        raise ValueError(
            f"{source} has peft_type {values['peft_type']!r}, and fastlora has only 'LORA'. "
            f"{what_else}"
        )
    foreign = {
        name: value
        for name, value in values.items()
        if not (
            name in _OURS | _SILENT | _AT_FIRST
            or value is None
            or value is False
            or value in ("", [], {})
        )
    }
    if foreign:
        settings = ", ".join(f"{name}={shown(value)}" for name, value in sorted(foreign.items()))
        raise ValueError(
            f"{source} has settings that fastlora doesn't support: {settings}. {what_else}"
        )
    return {name: value for name, value in values.items() if name in _OURS}


def _config(ours: dict[str, Any], source: str) -> LoRAConfig:
    ours.setdefault("lora_alpha", 8)  # PEFT's default
    for name in ("rank_pattern", "alpha_pattern"):
        ours[name] = ours.get(name) or {}
    try:
        return LoRAConfig(**ours)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} doesn't hold a LoRA config: {error}") from None
