"""Draw the results of a demo, as in ``python examples/plot.py out/loss.json picture.png``."""

import json
import sys
from pathlib import Path

import matplotlib
import numpy

matplotlib.use("Agg")
from matplotlib import pyplot

STYLES = {  # color, line, marker: all sides show where they agree
    "fastlora": ("C0", "-", "o"),
    "PEFT": ("C1", "--", "x"),
    "optimized": ("C2", ":", "+"),
}
NAMES = {"optimized": "PEFT, optimized"}


def plot(results_file: Path, picture: Path) -> None:
    """The same file gives the same picture."""
    report = json.loads(results_file.read_text())
    settings, machine = report["settings"], report["machine"]
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    draw_losses(panels[0], report["results"], settings["batch"] * settings["seq_len"])
    draw_times(panels[1], report["results"], report["step_time_over_peft"])
    draw_memory(panels[2], report["results"])
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    where = machine["gpu"] or f"{machine['processor']}, {threads}"
    figure.suptitle(
        f"{settings['model']}, LoRA r = {settings['rank']}, {settings['dtype']}, on {where}"
    )
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def draw_losses(axes, results: dict, tokens_per_step: int) -> None:
    for side, result in results.items():
        color, line, marker = STYLES[side]
        steps, losses = zip(*result["held_out_loss"], strict=True)
        tokens = [step * tokens_per_step / 1000 for step in steps]
        style = {"color": color, "marker": marker, "markersize": 8, "fillstyle": "none"}
        axes.plot(tokens, losses, line, label=NAMES.get(side, side), **style)
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
        axes.axhline(1, color=STYLES["PEFT"][0], linestyle="--")
    for place, (side, values) in enumerate(points.items()):
        color, ends = STYLES[side][0], [place - 0.3, place + 0.3]
        low, middle, high = numpy.percentile(values, [25, 50, 75])
        axes.plot(numpy.linspace(*ends, len(values)), values, ".", color=color, alpha=0.4)
        axes.fill_between(ends, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(ends, [middle, middle], color=color)
        axes.annotate(f"{middle:.2f}", (place + 0.32, middle), va="center")
    axes.set_xticks(range(len(points)), [NAMES.get(side, side) for side in points])
    axes.set(xlim=(-0.6, len(points) - 0.4), ylim=(0, None))


def draw_memory(axes, results: dict) -> None:
    """Bars of the growth to the peak; empty where the system doesn't tell it."""
    for place, (side, result) in enumerate(results.items()):
        growth = (result["peak_memory_growth"] or 0) / 2**30
        bar = axes.bar(place, growth, 0.6, color=STYLES[side][0], alpha=0.7)
        axes.bar_label(bar, [f"{growth:.2f}"])
    axes.set_xticks(range(len(results)), [NAMES.get(side, side) for side in results])
    axes.set(title="memory that training adds at its peak, GiB")


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
