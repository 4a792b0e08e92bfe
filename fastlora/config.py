"""LoRAConfig: what to adapt and how, under PEFT's names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .projection import check_adapter

_Number = TypeVar("_Number", int, float)
_BIAS = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and of what kind; fields mean what they mean to PEFT.

    ``r``, ``lora_alpha``: rank and numerator of the scaling lora_alpha / r, or lora_alpha / √r with
    ``use_rslora``. ``lora_dropout``: probability in [0, 1) of dropping an input of the adapter, in
    training. ``target_modules``: a list of module names or of their last parts (``["q_proj",
    "mlp.up_proj"]``), one regular expression that must match the whole name, or ``"all-linear"``
    for every linear layer but the output head.  None takes the attention projections of a
    transformers model. ``exclude_modules``: as target_modules, names to leave alone.
    ``rank_pattern``, ``alpha_pattern``: other ranks and alphas for layers whose name ends with a
    match of the pattern. ``bias``: which base biases train: "none", "all" of the model, or
    "lora_only", those of adapted layers. ``modules_to_save``: modules, by name or last part, that
    train in full and are saved with the adapter. ``init_lora_weights``: True (the identity change),
    "gaussian", or False (random lora_B, for tests). ``task_type`` and ``base_model_name_or_path``
    are passed through to the saved file.

    Raises ValueError for a number or a name that can't be meant.  It says nothing of DoRA,
    quantised layers or other PEFT methods: those are not fastlora's.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_adapter(self.r, self.lora_alpha, self.lora_dropout)
        for rank in self.rank_pattern.values():
            check_adapter(rank, self.lora_alpha, self.lora_dropout)
        for alpha in self.alpha_pattern.values():
            check_adapter(self.r, alpha, self.lora_dropout)
        if self.bias not in _BIAS:
            raise ValueError(
                f"bias is {self.bias!r}, but must be one of {', '.join(map(repr, _BIAS))}"
            )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}, "
                "but must be True, False or 'gaussian'"
            )
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(
                    self, name, tuple(sorted(value) if isinstance(value, set) else value)
                )
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"modules_to_save is {self.modules_to_save!r}, but must be a list of names"
            )

    def rank_of(self, name: str) -> int:
        """The rank of the layer of this name."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """The lora_alpha of the layer of this name."""
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)


def _by_pattern(patterns: Mapping[str, _Number], name: str, default: _Number) -> _Number:
    """The value of the first pattern that matches the end of the name at a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
