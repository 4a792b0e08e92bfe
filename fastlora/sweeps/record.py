"""A sweep's records: its state between two steps, in one file, and its final results."""

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layers.modules import some
from ..packing.files import write_whole
from ..text import columns, shown
from .trial import Trial

FILE, TABLE = "state.pt", "sweep.json"
ADAPTERS, BEST = "adapters", "best"


@dataclass
class State:
    """The state of a sweep between two steps; a resumed sweep must have the same ``settings``."""

    settings: dict[str, Any]
    alive: list[int]  # the numbers of the trials that continue
    losses: list[list[tuple[int, float]]]  # of each trial, by step
    seconds: float = 0.0  # of all steps
    adapters: list[dict[str, Tensor]] = field(default_factory=list)
    step: int = 0
    batches: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    random: list[Tensor] = field(default_factory=list)  # random states of the CPU and each GPU


def save(state: State, folder: Path) -> None:
    content = io.BytesIO()
    torch.save(vars(state), content)
    write_whole(folder, {FILE: content.getvalue()})


def earlier(folder: Path, settings: dict[str, Any], resume: bool) -> State | None:
    """The state to resume from, or None for a new sweep.

    Raises ValueError if the folder has a sweep and ``resume`` is not set, and if the sweep to
    resume has other settings or can't be read.
    """
    there = [name for name in (FILE, TABLE) if (folder / name).exists()]
    if not there:
        return None
    if not resume:
        raise ValueError(
            f"output_dir is {folder}, which has a sweep ({some(there)}): resume=True continues it; "
            "for a new sweep give another output_dir"
        )
    earlier = _read(folder / FILE)
    # Only the same trials and options end with the same result as an uninterrupted sweep.
    for name, value in settings.items():
        if earlier.settings.get(name) != value:
            raise ValueError(
                f"{folder / FILE} is of a sweep with {name} {shown(earlier.settings.get(name))}, "
                f"not {shown(value)}: give the same value, or another output_dir"
            )
    return earlier


def _read(path: Path) -> State:
    try:
        return State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(states: list[Tensor]) -> None:
    cpu, *gpus = states
    torch.set_rng_state(cpu)
    if len(gpus) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(gpus)


@dataclass(frozen=True)
class Outcome:
    """The result of one trial.

    ``losses``: held-out losses, pairs of (step, loss); the last step is before the sweep's if
    halving stopped it.
    """

    trial: Trial
    parameters: int
    losses: tuple[tuple[int, float], ...]

    @property
    def steps(self) -> int:
        """How many steps it trained."""
        return self.losses[-1][0]

    @property
    def loss(self) -> float:
        """The last held-out loss."""
        return self.losses[-1][1]


@dataclass(frozen=True)
class Sweep:
    """The results of all trials; prints as a table, the best first.

    ``best``: the trial with the lowest held-out loss among trials that ran all steps; None if no
    loss is finite.  ``folder`` holds its adapter in ``best/``, all adapters in ``adapters/NAME/``,
    and ``sweep.json``.
    """

    outcomes: tuple[Outcome, ...]
    steps: int
    seconds: float
    folder: Path

    @property
    def best(self) -> Outcome | None:
        whole = [outcome for outcome in self.outcomes if outcome.steps == self.steps]
        finite = [outcome for outcome in whole if math.isfinite(outcome.loss)]
        return min(finite, key=lambda outcome: outcome.loss, default=None)

    def as_dict(self) -> dict[str, Any]:
        """The results as plain dicts, numbers and texts."""
        trials = []
        for outcome in self.outcomes:
            numbers = dict(vars(outcome))
            trial = numbers.pop("trial")
            numbers["losses"] = [(step, _finite(loss)) for step, loss in outcome.losses]
            named = {"name": trial.name, "learning_rate": trial.learning_rate}
            numbers["steps"] = outcome.steps
            trials.append(named | {"config": trial.settings} | numbers)
        best = self.best and self.best.trial.name
        return {"best": best, "steps": self.steps, "seconds": self.seconds, "trials": trials}

    def __str__(self) -> str:
        ranked = sorted(self.outcomes, key=lambda trial: (-trial.steps, nan_last(trial.loss)))
        best = self.best.trial.name if self.best else "none, because no loss is finite"
        last = f"{self.steps} steps, {self.seconds:.0f} s; best: {best}"
        return "\n".join([*columns([_TITLES, *map(_cells, ranked)], left=1), last])


_TITLES = ("trial", "r", "learning rate", "parameters", "held-out loss", "steps")


def _cells(outcome: Outcome) -> tuple[str, ...]:
    trial = outcome.trial
    return (
        trial.name,
        f"{trial.config.r}",
        f"{trial.learning_rate:g}",
        f"{outcome.parameters:,}",
        f"{outcome.loss:.4f}",
        f"{outcome.steps}",
    )


def _finite(number: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON can't hold."""
    return number if math.isfinite(number) else None


def nan_last(loss: float) -> float:
    """A sort key that puts NaN last."""
    return math.inf if math.isnan(loss) else loss
