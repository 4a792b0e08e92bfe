"""LoRAConfig: which layers are adapted, and how.  Its fields have PEFT's names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from ..layers.modules import full_name
from ..settings import check_settings, suggests_arguments
from ..text import shown

_Number = TypeVar("_Number", int, float)
_BIAS = ("none", "all", "lora_only")
ALL_LINEAR = "all-linear"
# PEFT's order of an experts module's weights; it nests their adapters, the last one outermost.
IN_ORDER = ("gate_up_proj", "up_proj", "down_proj")


@suggests_arguments
@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and its settings.  Fields mean the same as in PEFT.

    * ``r``, ``lora_alpha``, ``use_rslora``: rank, and numerator of the scaling, which is
      lora_alpha / r, or lora_alpha / √r with ``use_rslora``.
    * ``lora_dropout``: probability in [0, 1) of dropping an input of the adapter, in training.
    * ``target_modules``: a list of module names or of their last parts (``["q_proj",
      "mlp.up_proj"]``); one regular expression that must match the whole name; or
      ``"all-linear"``, every linear layer except a transformers model's output head.  None means
      all attention projections of a transformers model (PEFT uses a table of defaults instead).
    * ``exclude_modules``: names that get no adapter, in the same forms.
    * ``layers_to_transform``: with a list of targets, adapt only layers of these numbers.  The
      number is the first one in the name (``model.layers.3.…``).  ``layers_pattern`` names the list
      of layers (``"layers"``) if another list with numbers comes first.
    * ``target_parameters``: weights of a transformers model's experts, by their names or last parts
      (``"experts.gate_up_proj"``).  A linear layer can also be named by its weight
      (``"up_proj.weight"``), as in PEFT.
    * ``rank_pattern``, ``alpha_pattern``: ranks and alphas of layers whose name ends with a match.
      A layer in ``target_parameters`` is matched by its weight's name.  The rank of experts is the
      rank of each expert.
    * ``bias``: which base biases train: "none", "all" of the model, or "lora_only" (biases of
      adapted layers).
    * ``modules_to_save``: modules that train in full and are saved, by the end of their names.  As
      in PEFT, ``"norm"`` also matches ``input_layernorm``.
    * ``init_lora_weights``: True (lora_B is zero), "gaussian", or False (lora_B is random).
    * ``task_type``: written to the saved file; "SEQ_CLS" and "TOKEN_CLS" also train the model's
      head.
    * ``base_model_name_or_path``: written to the saved file.

    Raises ValueError for an invalid number, pattern or word, and TypeError for an unknown field.
    Names are checked later, against the model.  DoRA and PEFT's other methods need PEFT.
    """

    r: int = 8
    lora_alpha: float = 16
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
        if not isinstance(self.bias, str) or self.bias not in _BIAS:
            raise ValueError(
                f"bias is {shown(self.bias)}, but must be one of {', '.join(map(repr, _BIAS))}"
            )
        init = self.init_lora_weights
        if not isinstance(init, bool) and not (isinstance(init, str) and init == "gaussian"):
            raise ValueError(
                f"init_lora_weights is {shown(init)}, but must be True, False or 'gaussian'"
            )
        for name, example in (("task_type", "CAUSAL_LM"), ("base_model_name_or_path", "gpt2")):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} is {shown(value)}, but must be a str like {example!r}")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            self._check_names(name, or_pattern=name in ("target_modules", "exclude_modules"))
        self._check_layers()

    def _check_layers(self) -> None:
        """Check ``layers_to_transform`` and ``layers_pattern``, and store them as tuples."""
        numbers, pattern = self.layers_to_transform, self.layers_pattern
        # The record is frozen, hence object.__setattr__.
        if numbers is not None:
            numbers = (numbers,) if isinstance(numbers, int) else numbers
            is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str | bytes)
            if not is_list or not all(type(n) is int and n >= 0 for n in numbers):
                raise ValueError(
                    f"layers_to_transform is {shown(self.layers_to_transform)}, "
                    "but must be a whole number from 0 on or a list of them"
                )
            object.__setattr__(self, "layers_to_transform", tuple(numbers) or None)
        if isinstance(pattern, str):
            object.__setattr__(self, "layers_pattern", (pattern,))
        self._check_names("layers_pattern", or_pattern=False)
        for name in self.layers_pattern or ():
            compile_pattern(name)
        # As in PEFT, a regular expression must match the whole name, layer's number included.
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform is {self.layers_to_transform} and target_modules is "
                f"{self.target_modules!r}, but it needs a list of names: write the layers' numbers "
                "into the regular expression, or name the layers"
            )

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

    def _check_names(self, field_name: str, *, or_pattern: bool) -> None:
        """Check a list of names, and store it as a tuple: a frozen record must be hashable."""
        names = getattr(self, field_name)
        if names is None:
            return
        if or_pattern and isinstance(names, str):
            compile_pattern(names)
            return
        # An iterator is refused, because checking would exhaust it.
        is_list = isinstance(names, Sequence | Set) and not isinstance(names, str | bytes)
        if not is_list or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{field_name} is {shown(names)}, but must be a list of names")
        if field_name == "modules_to_save" and "" in names:
            raise ValueError("modules_to_save has an empty name, which would mean every module")
        ordered = sorted(names) if isinstance(names, Set) else names
        object.__setattr__(self, field_name, tuple(ordered))

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


def kind_of(value: object) -> str:
    """The kind of an unexpected value; error messages use it."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    return f"of type {type(value).__name__}"


def weight_of(name: str) -> str:
    """The name of the weight of the layer of this name."""
    return full_name(name, "weight")


def is_all_linear(target_modules: object) -> bool:
    """Whether the targets are the word "all-linear", in upper or lower case."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def names_any(wanted: Iterable[str], name: str) -> bool:
    """Whether a wanted name equals this name or its last parts."""
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def is_inside(name: str, outer: str) -> bool:
    """Whether a name is the module's or one inside it."""
    return name == outer or name.startswith(f"{outer}.")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression.  Raises ValueError with the next step if it is invalid."""
    try:
        return _compile(pattern)
    except ValueError as error:
        raise ValueError(
            f"{shown(pattern)} is no regular expression ({error}): give a list for plain names"
        ) from None


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
