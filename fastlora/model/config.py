"""LoRAConfig: what to adapt and how, under PEFT's names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..projection import check_settings

_Number = TypeVar("_Number", int, float)
_BIAS = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and of what kind; fields mean what they mean to PEFT.

    * ``r``, ``lora_alpha``: rank, and numerator of the scaling: lora_alpha / r, or lora_alpha / √r
      with ``use_rslora``.
    * ``lora_dropout``: probability in [0, 1) of dropping an input of the adapter, in training.
    * ``target_modules``: a list of module names or of their last parts (``["q_proj",
      "mlp.up_proj"]``); one regular expression that must match the whole name; or
      ``"all-linear"``, every linear layer but a transformers model's output head.  None, which
      PEFT reads from a table, takes a transformers model's attention projections, all of them.
    * ``exclude_modules``: names to leave alone, in the same forms.
    * ``rank_pattern``, ``alpha_pattern``: ranks and alphas of layers whose name ends with a match.
    * ``bias``: the base biases that train: "none", "all" of the model, or "lora_only", those of
      adapted layers.
    * ``modules_to_save``: modules, by name or last part, that train in full and are saved too.
    * ``init_lora_weights``: True (the identity change), "gaussian", or False (random lora_B).
    * ``task_type``: goes to the saved file; "SEQ_CLS" and "TOKEN_CLS" also train the model's head.
    * ``base_model_name_or_path``: goes to the saved file.

    Raises ValueError for a number, a pattern or a word that can't be meant; names are looked up in
    a model later.  DoRA, quantised layers and other PEFT methods are not fastlora's.
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
        check_settings(self.r, self.lora_alpha, self.lora_dropout)
        self._check_patterns("rank_pattern", lambda rank: check_settings(rank, 1, 0.0))
        self._check_patterns("alpha_pattern", lambda alpha: check_settings(1, alpha, 0.0))
        if self.bias not in _BIAS:
            raise ValueError(
                f"bias is {self.bias!r}, but must be one of {', '.join(map(repr, _BIAS))}"
            )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}, "
                "but must be True, False or 'gaussian'"
            )
        if self.task_type is not None and not isinstance(self.task_type, str):
            raise ValueError(
                f"task_type is {self.task_type!r}, but must be a word like 'CAUSAL_LM'"
            )
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora is {self.use_rslora!r}, but must be True or False")
        self._check_names("target_modules", or_pattern=True)
        self._check_names("exclude_modules", or_pattern=True)
        self._check_names("modules_to_save", or_pattern=False)

    def _check_patterns(self, field_name: str, check_value: Callable[[Any], None]) -> None:
        patterns = getattr(self, field_name)
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{field_name} is {patterns!r}, but must map patterns to numbers")
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
                check_value(value)
            except (re.error, ValueError) as error:
                raise ValueError(f"{field_name} has {pattern!r}: {value!r}: {error}") from None

    def _check_names(self, field_name: str, *, or_pattern: bool) -> None:
        """Keep a list of names as a tuple, since the record is frozen."""
        names = getattr(self, field_name)
        if names is None or (or_pattern and isinstance(names, str)):
            return
        is_list = isinstance(names, Iterable) and not isinstance(names, str | Mapping)
        if not is_list or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{field_name} is {names!r}, but must be a list of names")
        ordered = sorted(names) if isinstance(names, Set) else names
        object.__setattr__(self, field_name, tuple(ordered))

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
