"""What a sweep found: a line for each trial, the best first, and their curves."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..table import columns
from .trial import Trial


@dataclass(frozen=True)
class Outcome:
    """One trial: how it went.

    ``losses`` are held out: pairs of (step, loss).  ``seconds`` is its share of the steps it took
    part in.  ``steps`` is fewer than the sweep's if it was stopped on the way.
    """

    trial: Trial
    parameters: int
    bytes: int  # of them, which is the size of the adapter's file
    losses: tuple[tuple[int, float], ...]
    seconds: float
    steps: int

    @property
    def loss(self) -> float:
        """The last held-out loss."""
        return self.losses[-1][1]


@dataclass(frozen=True)
class Sweep:
    """All trials; prints as a table, the best first.

    ``best`` is the trial with the lowest held-out loss of those that ran to the end, ``folder`` has
    its adapter in ``best/``, everyone's in ``adapters/NAME/``, ``sweep.json`` and ``losses.png``.
    """

    outcomes: tuple[Outcome, ...]
    steps: int
    seconds: float
    folder: Path

    @property
    def best(self) -> Outcome:
        whole = [outcome for outcome in self.outcomes if outcome.steps == self.steps]
        return min(whole, key=lambda outcome: nan_last(outcome.loss))

    def as_dict(self) -> dict[str, Any]:
        """For a program: plain numbers and texts."""
        outcomes = [
            {
                "name": outcome.trial.name,
                "learning_rate": outcome.trial.learning_rate,
                "config": {k: v for k, v in vars(outcome.trial.config).items() if v is not None},
                "parameters": outcome.parameters,
                "bytes": outcome.bytes,
                # JSON has no NaN.
                "losses": [(s, x if math.isfinite(x) else None) for s, x in outcome.losses],
                "seconds": outcome.seconds,
                "steps": outcome.steps,
            }
            for outcome in self.outcomes
        ]
        return {
            "best": self.best.trial.name,
            "steps": self.steps,
            "seconds": self.seconds,
            "trials": outcomes,
        }

    def __str__(self) -> str:
        ranked = sorted(self.outcomes, key=lambda each: (-each.steps, nan_last(each.loss)))
        last = f"{self.steps} steps, {self.seconds:.0f} s; best: {self.best.trial.name}"
        return "\n".join([*columns([_TITLES, *map(_cells, ranked)], left=1), last])


_TITLES = ("trial", "r", "learning rate", "parameters", "MiB", "held-out loss", "steps", "seconds")


def _cells(outcome: Outcome) -> tuple[str, ...]:
    trial = outcome.trial
    return (
        trial.name,
        f"{trial.config.r}",
        f"{trial.learning_rate:g}",
        f"{outcome.parameters:,}",
        f"{outcome.bytes / 2**20:.1f}",
        f"{outcome.loss:.4f}",
        f"{outcome.steps}",
        f"{outcome.seconds:.0f}",
    )


def nan_last(loss: float) -> float:
    """A loss's place in an order in which NaN is last."""
    return math.inf if math.isnan(loss) else loss


def curves(sweep: Sweep) -> dict[str, bytes]:
    """The held-out losses as ``losses.png``; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    figure, content = Figure(figsize=(7, 4.5), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot()
    for outcome in sweep.outcomes:
        steps, losses = zip(*outcome.losses, strict=True)
        best = outcome is sweep.best
        label = f"{outcome.trial.name}: {outcome.loss:.3f}"
        axes.plot(steps, losses, marker="o", markersize=3, lw=2.5 if best else 1.2, label=label)
    axes.set(xlabel="step", ylabel="held-out loss", xlim=(0, None))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(content, format="png", dpi=120)
    return {"losses.png": content.getvalue()}
