"""PEFT's ``adapter_config.json``, to and from a LoRAConfig.  It imports nothing of PEFT."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Any, TypeVar

from torch import nn

from ..layers.frozen import is_router
from ..projection import shown
from .candidates import expert_modules
from .config import LoRAConfig, is_all_linear, kind_of, weight_of

_Number = TypeVar("_Number", int, float)
_OURS = {field.name for field in fields(LoRAConfig)}
# Settings that say nothing of the layers' arithmetic, or that say it only together with a switch
# which is refused.
_SILENT = {
    "auto_mapping",
    "corda_config",  # this and its like: only with that init_lora_weights
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",  # the layers' class tells, in PEFT too
    "inference_mode",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
}
# How lora_A and lora_B began, which the file's values replace.
_REPLACED_BY_THE_FILE = ("gaussian", "eva", "orthogonal")
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Names of linear layers that PEFT takes for experts', in a model that has experts.
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def spell_out(
    model: nn.Module, config: LoRAConfig, layers: Iterable[str], experts: Collection[str]
) -> LoRAConfig:
    """The same config with the layers' names in place of "all-linear" and the like.

    ``experts``: which of these names are those of experts' weights.

    PEFT from 0.20 on rewrites a config for a mixture of experts as it loads it: targets of certain
    names become experts' parameters, other regular expressions lists of last parts.  There, layers
    of those names are spelled as ``target_parameters``, which it leaves alone.
    """
    rewritten = _has_experts(model)
    targets, dense = config.target_modules, [name for name in layers if name not in experts]
    as_weights = {
        name
        for name in dense
        if config.names_weight_of(name)
        or (rewritten and name.rpartition(".")[2] in _NAMES_OF_EXPERTS)
        or is_router(model.get_submodule(name))
    }
    chosen_here = targets is None or is_all_linear(targets)
    if not (as_weights or chosen_here or (rewritten and isinstance(targets, str))):
        return config
    modules = [name for name in dense if name not in as_weights]
    return replace(
        config,
        target_modules=short_targets(model, modules),
        target_parameters=sorted([*map(weight_of, as_weights), *experts]) or None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=_with_weights(config.rank_pattern, config.rank_of, config.r, as_weights),
        alpha_pattern=_with_weights(
            config.alpha_pattern, config.alpha_of, config.lora_alpha, as_weights
        ),
    )


def _has_experts(model: nn.Module) -> bool:
    """Whether PEFT may take a transformers model for a mixture of experts."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return False
    return bool(expert_modules(model)) or any(
        getattr(config, name, None) for name in _EXPERT_COUNTS
    )


def _with_weights(
    patterns: Mapping[str, _Number],
    value_of: Callable[[str], _Number],
    default: _Number,
    layers: Iterable[str],
) -> dict[str, _Number]:
    """The patterns, and a new one for the weight of each layer whose value isn't the default."""
    own = {
        ".".join(map(re.escape, weight_of(name).split("."))): value_of(name)
        for name in sorted(layers)
        if value_of(name) != default
    }
    return {**patterns, **own}


def to_peft(config: LoRAConfig, base_name: str | None, fan_in_fan_out: bool) -> dict[str, Any]:
    """The JSON object that PEFT reads; ``fan_in_fan_out``: the layers' weights are [in, out]."""
    values = {name: getattr(config, name) for name in _OURS}
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = dict(values[name])  # in its order: the first pattern that matches counts
    values = {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }
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
        "init_lora_weights": True,  # the file's weights replace whatever a loader initialises
        "inference_mode": True,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_bias": False,
        "use_dora": False,
    }
    return dict(sorted(values.items()))


def from_peft(values: Mapping[str, Any], source: str) -> LoRAConfig:
    """The LoRAConfig of a JSON object of PEFT's.

    A setting that fastlora hasn't is a ValueError that names it, unless it is off (null, false, or
    empty).
    """
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
    if isinstance(init, str) and init.lower().startswith(_CHANGING_THE_BASE):
        raise ValueError(
            f"{source} has init_lora_weights={init!r}, which changes the base "
            "weights too: load it with PEFT and save it converted "
            "(path_initial_model_for_weight_conversion)"
        )
    if init not in (None, True, False, *_REPLACED_BY_THE_FILE):
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
        if name not in _OURS | _SILENT and not _is_off(value)
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
