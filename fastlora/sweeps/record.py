"""A sweep's records: its state between two steps, in one file, and its final results."""

import io
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.text import columns, shown
from ..layers.modules import some
from ..packing.files import CONFIG, WEIGHTS, write_whole
from .trial import Trial

FILE, TABLE = "state.pt", "sweep.json"
ADAPTERS, BEST = "adapters", "best"


@dataclass
class State:
    """The state of a sweep between two steps; a resumed sweep must have the same ``settings``."""

    settings: dict[str, Any]
    # The numbers of the trials that continue; and for each trial its losses, seconds and steps.
    alive: list[int]
    losses: list[list[tuple[int, float]]]
    seconds: list[float]
    steps: list[int]
    adapters: list[dict[str, Tensor]] = field(default_factory=list)
    step: int = 0
    batches: int = 0  # read so far
    checksum: int = 0  # of the batches
    optimizer: dict[str, Any] = field(default_factory=dict)
    random: list[Tensor] = field(default_factory=list)  # random states of the CPU and each GPU

    @classmethod
    def begun(cls, settings: dict[str, Any], trials: int) -> "State":
        losses: list[list] = [[] for _ in range(trials)]
        return cls(settings, list(range(trials)), losses, [0.0] * trials, [0] * trials)


def save(state: State, folder: Path) -> None:
    content = io.BytesIO()
    torch.save(vars(state), content)
    write_whole(folder, {FILE: content.getvalue()})


def earlier(folder: Path, settings: dict[str, Any], *, resume: bool, replace: bool) -> State | None:
    """The state to resume from, or None for a new sweep.

    Raises ValueError if the folder has a sweep and neither ``resume`` nor ``replace`` is set, and
    if the sweep to resume has other settings or can't be read.
    """
    if resume and replace:
        raise ValueError("resume continues a sweep, and replace deletes it: give only one")
    there = [name for name in (FILE, TABLE) if (folder / name).exists()]
    if not there or replace:
        return None
    if not resume:
        raise ValueError(
            f"output_dir is {folder}, which has a sweep ({some(there)}): resume=True continues it, "
            "replace=True deletes it, and another output_dir keeps it"
        )
    try:
        saved = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        earlier = State(**saved)
    except Exception as error:
        raise ValueError(f"{folder / FILE} can't be read: {error}") from error
    # Only the same trials and options end with the same result as an uninterrupted sweep.
    for name, value in settings.items():
        if earlier.settings.get(name) != value:
            raise ValueError(
                f"{folder / FILE} is of a sweep with {name} {shown(earlier.settings.get(name))}, "
                f"not {shown(value)}: give the same value, another output_dir, or replace=True "
                "instead of resume"
            )
    return earlier


def delete(folder: Path) -> None:
    """Delete the files of the folder's sweep; the next sweep overwrites its state file.

    Only a sweep's files are deleted; a folder goes only if it is empty afterwards.
    """
    for adapter in [*(folder / ADAPTERS).glob("*"), folder / BEST]:
        delete_adapter(adapter)
    _delete_empty(folder / ADAPTERS)
    (folder / TABLE).unlink(missing_ok=True)


def delete_adapter(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():  # a link's target doesn't belong to the sweep
        for name in (WEIGHTS, CONFIG):
            (folder / name).unlink(missing_ok=True)
        _delete_empty(folder)


def _delete_empty(folder: Path) -> None:
    with suppress(OSError):  # it isn't empty, or doesn't exist
        folder.rmdir()


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

    ``losses``: held-out losses, pairs of (step, loss).  ``seconds``: its share of the time of its
    steps.  ``steps``: fewer than the sweep's if halving stopped it.  ``effective_rank``: the mean
    over the layers, as in ``fastlora.resize_adapter``.
    """

    trial: Trial
    parameters: int
    bytes: int  # size of the parameters
    losses: tuple[tuple[int, float], ...]
    seconds: float
    steps: int
    effective_rank: float

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
            numbers["effective_rank"] = _finite(outcome.effective_rank)
            named = {"name": trial.name, "learning_rate": trial.learning_rate}
            trials.append(named | {"config": trial.settings} | numbers)
        best = self.best and self.best.trial.name
        return {"best": best, "steps": self.steps, "seconds": self.seconds, "trials": trials}

    def __str__(self) -> str:
        ranked = sorted(self.outcomes, key=lambda trial: (-trial.steps, nan_last(trial.loss)))
        best = self.best.trial.name if self.best else "none, because no loss is finite"
        last = f"{self.steps} steps, {self.seconds:.0f} s; best: {best}"
        rows = [tuple([cell(outcome) for cell in _COLUMNS.values()]) for outcome in ranked]
        return "\n".join([*columns([tuple(_COLUMNS), *rows], left=1), last])


# The cells of an outcome, by their column's title.
_COLUMNS: dict[str, Callable[[Outcome], str]] = {
    "trial": lambda outcome: outcome.trial.name,
    "r": lambda outcome: f"{outcome.trial.config.r}",
    "effective": lambda outcome: f"{outcome.effective_rank:.1f}",
    "learning rate": lambda outcome: f"{outcome.trial.learning_rate:g}",
    "parameters": lambda outcome: f"{outcome.parameters:,}",
    "MiB": lambda outcome: f"{outcome.bytes / 2**20:.1f}",
    "held-out loss": lambda outcome: f"{outcome.loss:.4f}",
    "steps": lambda outcome: f"{outcome.steps}",
    "seconds": lambda outcome: f"{outcome.seconds:.0f}",
}


def _finite(number: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON can't hold."""
    return number if math.isfinite(number) else None


def nan_last(loss: float) -> float:
    """A sort key that puts NaN last."""
    return math.inf if math.isnan(loss) else loss
