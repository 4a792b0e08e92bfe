"""PEFT's ``adapter_config.json``, and its keys of tensors in a file.  PEFT is not imported."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeVar

from ..common.text import shown
from ..common.values import check_settings
from ..layers.modules import full_name
from ..packing.files import PREFIX

_Number = TypeVar("_Number", int, float)
# PEFT's order of an experts module's weights; it nests their adapters, the last one outermost.
IN_ORDER = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a saved LoRA adapter that its tensors' meaning depends on.

    Fields have PEFT's names and defaults.  Raises ValueError for an invalid number or pattern.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_parameters: Sequence[str] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _at_end(pattern)
        for rank in self.rank_pattern.values():
            check_settings(rank, 1, 0.0)
        for alpha in self.alpha_pattern.values():
            check_settings(1, alpha, 0.0)
        if not isinstance(self.target_parameters or (), Sequence | Set):
            raise ValueError(f"target_parameters is {shown(self.target_parameters)}, but no list")

    def rank_of(self, name: str) -> int:
        """The rank of the layer of this name."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """The lora_alpha of the layer of this name."""
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def weights_in(self, module: str) -> list[str]:
        """The names of an experts module's weights in ``target_parameters``, as PEFT nests them."""
        parts = [wanted.rpartition(".") for wanted in self.target_parameters or ()]
        owners = [(owner or "experts", last) for owner, _, last in parts if last != "weight"]
        endings = {last for owner, last in owners if names_any([owner], module)}
        # For other names, PEFT's order of nesting is unknown.
        known = [last for last in IN_ORDER if last in endings] if len(endings) > 1 else endings
        return [f"{module}.{last}".lstrip(".") for last in known]


def names_any(wanted: Iterable[str], name: str) -> bool:
    """Whether a wanted name equals this name or its last parts."""
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _by_pattern(patterns: Mapping[str, _Number], name: str, default: _Number) -> _Number:
    """The value of the first pattern that matches the end of the name, after a dot."""
    return next((value for one, value in patterns.items() if _at_end(one).match(name)), default)


@cache  # re's cache has 512 entries, and a large model's lookups would evict other patterns
def _at_end(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {shown(pattern)}: {error}") from None


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


def pairs_of(names: Iterable[str], experts: Collection[str]) -> dict[str, tuple[str, str]]:
    """The keys of lora_A and lora_B in a file, by the name of the layer or of the experts' weight.

    PEFT wraps an experts module once for each weight; the last weight's wrapper is the outermost.
    """
    by_module: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0] if name in experts else name
        by_module.setdefault(module, []).append(name)
    pairs = {}
    for module, weights in by_module.items():
        # In a module, down_proj's wrapper is the outermost.  ``outside``: wrappers around this one.
        ordered = sorted(weights, key=lambda name: name.endswith("down_proj"), reverse=True)
        for outside, name in enumerate(ordered):
            layer = ".".join(filter(None, (module, *["base_layer"] * outside)))
            a, b = (full_name(layer, f"lora_{side}.weight") for side in "AB")
            pairs[name] = PREFIX + a, PREFIX + b
    return pairs
