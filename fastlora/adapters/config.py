"""AdapterConfig: the settings in an adapter's files that the meaning of its tensors depends on."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from ..layers.modules import full_name
from ..settings import check_settings
from ..text import shown

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
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_settings(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora)
        self._check_patterns("rank_pattern", lambda rank: check_settings(rank, 1, 0.0))
        self._check_patterns("alpha_pattern", lambda alpha: check_settings(1, alpha, 0.0))
        if not isinstance(self.target_parameters or (), Sequence | Set):
            raise ValueError(f"target_parameters is {shown(self.target_parameters)}, but no list")

    def _check_patterns(self, field_name: str, check_value: Callable[[Any], None]) -> None:
        patterns = getattr(self, field_name)
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{field_name} is {shown(patterns)}, but must map patterns to numbers")
        for pattern, value in patterns.items():
            # Compile it by itself and in its final form: "a)(b" is valid only in the second.
            try:
                _compile(pattern)
                _at_end(pattern)
                check_value(value)
            except ValueError as error:
                raise ValueError(
                    f"{field_name} has {shown(pattern)}: {shown(value)}: {error}"
                ) from None

    def rank_of(self, name: str) -> int:
        """The rank of the layer of this name."""
        return _by_pattern(self.rank_pattern, self._name_in_patterns(name), self.r)

    def alpha_of(self, name: str) -> float:
        """The lora_alpha of the layer of this name."""
        return _by_pattern(self.alpha_pattern, self._name_in_patterns(name), self.lora_alpha)

    def names_weight_of(self, name: str) -> bool:
        """Whether ``target_parameters`` names the weight of the layer of this name."""
        return names_any(self.target_parameters or (), weight_of(name))

    def weights_in(self, module: str) -> list[str]:
        """The names of an experts module's weights in ``target_parameters``, as PEFT nests them."""
        parts = [wanted.rpartition(".") for wanted in self.target_parameters or ()]
        owners = [(owner or "experts", last) for owner, _, last in parts if last != "weight"]
        endings = {last for owner, last in owners if names_any([owner], module)}
        # For other names, PEFT's order of nesting is unknown.
        known = [last for last in IN_ORDER if last in endings] if len(endings) > 1 else endings
        return [f"{module}.{last}".lstrip(".") for last in known]

    def _name_in_patterns(self, name: str) -> str:
        return weight_of(name) if self.names_weight_of(name) else name


def weight_of(name: str) -> str:
    """The name of the weight of the layer of this name."""
    return full_name(name, "weight")


def names_any(wanted: Iterable[str], name: str) -> bool:
    """Whether a wanted name equals this name or its last parts."""
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None


def _by_pattern(patterns: Mapping[str, _Number], name: str, default: _Number) -> _Number:
    """The value of the first pattern that matches the end of the name, after a dot."""
    return next((value for one, value in patterns.items() if _at_end(one).match(name)), default)


@cache  # re's cache has 512 entries, and a large model's lookups would evict other patterns
def _at_end(pattern: str) -> re.Pattern[str]:
    return _compile(rf"(.*\.)?({pattern})$")
