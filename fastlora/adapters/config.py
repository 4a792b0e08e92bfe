"""AdapterConfig: the settings in an adapter's files that the meaning of its tensors depends on."""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

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
