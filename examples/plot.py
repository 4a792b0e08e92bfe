"""Draw the results of a demo, as in ``python examples/plot.py out/loss.json picture.png``."""

import json
import sys
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from table import name_of

STYLES = {  # all sides show where they agree
    "fastlora": {"color": "C0", "linestyle": "-", "marker": "o"},
    "PEFT": {"color": "C1", "linestyle": "--", "marker": "x"},
    "optimized": {"color": "C2", "linestyle": ":", "marker": "+"},
    "dense": {"color": "C3", "linestyle": "-.", "marker": "s"},
    "GGUF": {"color": "C4", "linestyle": (0, (1, 3)), "marker": "^"},
    "MXFP4 experts": {"color": "C3", "linestyle": "-.", "marker": "s"},
    "NF4 experts": {"color": "C4", "linestyle": (0, (1, 3)), "marker": "^"},
}


def plot(results_file: Path, picture: Path) -> None:
    """The same file gives the same picture."""
    report = json.loads(results_file.read_text())
    settings, machine, results = report["settings"], report["machine"], report["results"]
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_losses(left, results, settings["batch"] * settings["seq_len"])
    draw_times(middle, results, report["step_time_over_peft"])
    draw_memory(right, results)
    where = machine["gpu"] or f"{machine['processor']}, threads: {machine['threads']}"
    what = f"{settings['model']}, LoRA r = {settings['rank']}, {settings['dtype']}"
    figure.suptitle(f"{what}, on {where}")
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})


def draw_losses(axes, results: dict, tokens_per_step: int) -> None:
    for side, result in results.items():
        steps, losses = numpy.transpose(result["held_out_loss"])
        tokens = steps * tokens_per_step / 1000
        axes.plot(
            tokens, losses, **STYLES[side], label=name_of(side), fillstyle="none", markersize=8
        )
    axes.set(title="held-out loss, nats per token", xlabel="thousand tokens trained on")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_times(axes, results: dict, over_peft: dict[str, dict]) -> None:
    """Each pair of steps as a point, their median and quartiles; without PEFT, the seconds."""
    points = {side: result["seconds_per_step"] for side, result in results.items()}
    axes.set_title("seconds of a step")
    if over_peft:
        points = {side: ratios["pairs"] for side, ratios in over_peft.items()}
        axes.set_title("time of a step / PEFT's, in pairs")
        axes.axhline(1, color="C1", linestyle="--")
    for place, (side, values) in enumerate(points.items()):
        color, ends = STYLES[side]["color"], [place - 0.3, place + 0.3]
        low, middle, high = numpy.percentile(values, [25, 50, 75])
        axes.plot(numpy.linspace(*ends, len(values)), values, ".", color=color, alpha=0.4)
        axes.fill_between(ends, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(ends, [middle, middle], color=color)
        axes.annotate(f"{middle:.2f}", (place + 0.32, middle), va="center")
    axes.set_xticks(range(len(points)), [name_of(side) for side in points])
    axes.set(xlim=(-0.6, len(points) - 0.4), ylim=(0, None))


def draw_memory(axes, results: dict) -> None:
    """Bars of the growth to the peak; empty where the system doesn't tell it."""
    names, colors = [name_of(side) for side in results], [STYLES[side]["color"] for side in results]
    growth = [(result["peak_memory_growth"] or 0) / 2**30 for result in results.values()]
    axes.bar_label(axes.bar(names, growth, 0.6, color=colors, alpha=0.7), fmt="%.2f")
    axes.margins(y=0.1)  # for the label of the tallest
    axes.set_title("memory that training adds at its peak, GiB")


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
