"""The arguments of a sweep: its trials, and options that all trials share."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..common.other_packages import optional
from ..common.text import shown
from ..common.values import check_settings, is_number, must

_SCHEDULES = ("linear", "cosine", "constant")
_RATE = "learning_rate"
# The fields of peft.LoraConfig that a trial may set.
_TRIED = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "task_type", "base_model_name_or_path",
}  # fmt: skip
_NAME = r"(?!\.)[\w.,=+-]+"  # can't lead out of the parent folder
_LONGEST = 200  # bytes of a name; file systems allow 255
_SHORT = {"lora_alpha": "alpha", "lora_dropout": "dropout", _RATE: "lr", "target_modules": ""}


@dataclass(frozen=True)
class Trial:
    """A configuration with its learning rate, and a name, which also names its folder.

    ``config``: a ``peft.LoraConfig``.  ``settings``: its fields that the sweep was given.
    """

    name: str
    config: Any
    settings: dict[str, Any]
    learning_rate: float

    @property
    def plain(self) -> dict[str, Any]:
        """The trial as plain values, to be written to the state file."""
        settings = {k: sorted(v) if isinstance(v, set) else v for k, v in self.settings.items()}
        return {"name": self.name, "learning_rate": self.learning_rate} | settings


def as_trials(configs: Sequence[Mapping[str, Any]]) -> tuple[Trial, ...]:
    """The trials of a sweep's ``configs``.

    Raises TypeError if ``configs`` is not a list of mappings.  Raises ValueError for an unknown or
    invalid field, and if two trials have the same name.
    """
    is_list = isinstance(configs, Sequence) and not isinstance(configs, str)
    must(is_list and len(configs) > 0, "configs", configs, "a list of dicts", TypeError)
    trials = []
    for i, entry in enumerate(configs):
        must(isinstance(entry, Mapping), f"configs[{i}]", entry, "a dict", TypeError)
        trials.append(_as_trial(i, entry, _name(entry, configs)))
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two of configs are called {name!r}: give each a different 'name'")
    return tuple(trials)


def _as_trial(number: int, entry: Mapping[str, Any], name: str) -> Trial:
    kind = optional("peft", "sweep needs PEFT", "peft").LoraConfig
    unknown = [key for key in entry if key not in _TRIED | {_RATE, "name"}]
    if unknown:
        raise ValueError(
            f"configs[{number}] has {shown(unknown[0])}, but trials have plain LoRA adapters of "
            f"linear layers: give {_RATE!r}, 'name', or these fields of peft.LoraConfig: "
            f"{', '.join(sorted(_TRIED))}"
        )
    rate: Any = entry.get(_RATE)
    fits = is_number(rate) and 0 < rate < float("inf")
    must(fits, f"configs[{number}][{_RATE!r}]", rate, "a number above 0")
    settings = {"target_modules": "all-linear"} | {k: v for k, v in entry.items() if k in _TRIED}
    config = kind(**settings)
    check_settings(config.r, config.lora_alpha, config.lora_dropout, config.use_rslora)
    if not re.fullmatch(_NAME, name) or len(name.encode()) > _LONGEST:
        raise ValueError(
            f"configs[{number}] is called {shown(name)}, which can't name a folder: give it a "
            f"'name' of letters, digits and .,=+-, of at most {_LONGEST} bytes"
        )
    return Trial(name, config, settings, float(rate))


def _name(entry: Mapping[str, Any], others: Sequence[Any]) -> str:
    """The given name, or a name made of the fields that differ among the configurations."""
    if "name" in entry:
        return str(entry["name"])
    # Only fields whose value differs from another configuration's distinguish the trial.
    keys = [
        key
        for key in entry
        if any(not isinstance(e, Mapping) or e.get(key) != entry[key] for e in others)
    ]
    # If no field differs, the rank makes the name.
    parts = [f"{_SHORT.get(key, key)}{_text(entry[key])}" for key in keys or ["r"] if key in entry]
    return "-".join(parts) or "trial"


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"
    return re.sub(r"[^\w.,=+-]", "_", text)


class Options(NamedTuple):
    """The options that all trials share."""

    steps: int
    halving: bool
    eval_steps: int
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    seed: int

    def check(self, trials: int) -> None:
        """Raise ValueError for an option that is invalid for this number of trials."""
        for name in ("steps", "eval_steps", "warmup_steps", "seed"):
            value, least = getattr(self, name), int(name in ("steps", "eval_steps"))
            fits = type(value) is int and least <= value < 2**63  # torch's limit for a seed
            must(fits, name, value, f"a whole number from {least} on and below 2⁶³")
        must(self.schedule in _SCHEDULES, "schedule", self.schedule, f"one of {_SCHEDULES}")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            must(is_number(value) and value >= 0, name, value, "a number of at least 0")
        if self.steps <= self._halvings(trials):
            raise ValueError(f"steps is {self.steps}, too few to halve {trials} trials to one")

    def rungs(self, trials: int) -> dict[int, int]:
        """The number of trials that continue after a step, by step; at equal intervals."""
        halvings = self._halvings(trials)
        # Halving i leaves ⌈trials / 2ⁱ⁺¹⌉.
        return {
            self.steps * (i + 1) // (halvings + 1): -(-trials // 2 ** (i + 1))
            for i in range(halvings)
        }

    def _halvings(self, trials: int) -> int:
        """The number of halvings until one trial is left."""
        # ⌈log₂ trials⌉
        return (trials - 1).bit_length() if self.halving else 0

    def factor(self, step: int) -> float:
        """The factor of the learning rate in this step; the first step is 0."""
        # No step has a rate of 0: the first has 1 / (warmup_steps + 1), and ``done`` stays below 1.
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        rest = max(1, self.steps - self.warmup_steps)
        done = (step - self.warmup_steps) / rest
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 if self.schedule == "constant" else 1 - done
