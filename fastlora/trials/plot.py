"""The curves of a sweep, by matplotlib where it is installed."""

import os
from pathlib import Path

from .record import Sweep


def draw(sweep: Sweep, path: Path) -> bool:
    """Write the held-out losses as a PNG, whole or not at all; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for outcome in sweep.outcomes:
        steps, losses = zip(*outcome.losses, strict=True)
        best = outcome is sweep.best
        label = f"{outcome.trial.name}: {outcome.loss:.3f}"
        axes.plot(steps, losses, marker="o", markersize=3, lw=2.5 if best else 1.2, label=label)
    axes.set(xlabel="step", ylabel="held-out loss", xlim=(0, None))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    part = path.with_name(f".{path.name}")
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, path)
    return True
