"""Draw the results of a demo: ``python examples/plot.py out/loss.json picture.png``."""

import json
import sys
from pathlib import Path

import numpy
from matplotlib import rc_context
from matplotlib.figure import Figure
from table import name_of

STYLES = {  # chosen so that equal curves of all sides stay visible
    "frozen": {"color": "0.5", "linestyle": ":", "marker": "d"},
    "fastlora": {"color": "C0", "linestyle": "-", "marker": "o"},
    "PEFT": {"color": "C1", "linestyle": "--", "marker": "x"},
    "optimized": {"color": "C2", "linestyle": ":", "marker": "+"},
    "int8": {"color": "C5", "linestyle": "--", "marker": "v"},
    "dense": {"color": "C3", "linestyle": "-.", "marker": "s"},
    "GGUF": {"color": "C4", "linestyle": (0, (1, 3)), "marker": "^"},
    "MXFP4 experts": {"color": "C3", "linestyle": "-.", "marker": "s"},
    "NF4 experts": {"color": "C4", "linestyle": (0, (1, 3)), "marker": "^"},
}
# The picture is as wide as a phone: 390 points, with letters of 10 to 11, at two pixels per point.
SIZE, DOTS = (390 / 72, 340 / 72), 144
LETTERS = {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}


def plot(results_file: Path, picture: Path) -> None:
    """Draw the picture.  The same file always gives the same bytes."""
    report = json.loads(results_file.read_text())
    settings, machine, results = report["settings"], report["machine"], report["results"]
    with rc_context(LETTERS):
        figure = Figure(figsize=SIZE, layout="constrained")
        grid = figure.add_gridspec(2, 2)
        times, memory = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        draw_times(times, results, report["step_time_over_peft"])
        draw_memory(memory, results)
        tokens = settings["batch"] * settings["seq_len"]
        draw_losses(figure.add_subplot(grid[1, :]), results, tokens)
        where = machine["gpu"] or f"{machine['processor']}, threads: {machine['threads']}"
        what = f"{settings['model']}, LoRA r = {settings['rank']}, {settings['dtype']}"
        figure.suptitle(f"{what}\n{where}", fontsize=10)
        figure.savefig(picture, format="png", dpi=DOTS, metadata={"Software": None})


def draw_times(axes, results: dict, over_peft: dict[str, dict]) -> None:
    """A point for each pair of steps, and a bar for the median; without PEFT, the seconds."""
    points = {side: result["seconds_per_step"] for side, result in results.items()}
    axes.set_title("step time, s")
    if over_peft:
        points = {side: over_peft.get(side, {"pairs": [1.0]})["pairs"] for side in results}
        axes.set_title("step time / PEFT's")
    draw_bars(axes, {side: numpy.median(values) for side, values in points.items()}, "{:.2f}")
    for place, values in enumerate(points.values()):
        if len(values) > 1:
            across = numpy.linspace(place - 0.25, place + 0.25, len(values))
            axes.plot(values, across, ".", color="black", alpha=0.4, markersize=3)
    axes.set_yticks(range(len(points)), [name_of(side).replace(", ", ",\n") for side in points])


def draw_memory(axes, results: dict) -> None:
    """The growth to the peak; empty if the system doesn't report it."""
    growth = {side: (each["peak_memory_growth"] or 0) / 2**30 for side, each in results.items()}
    draw_bars(axes, growth, "{:.2f}")
    axes.set_title("peak memory growth, GiB")
    axes.set_yticks([])


def draw_bars(axes, values: dict[str, float], form: str) -> None:
    """Horizontal bars, the first on top.  The number is at the left, where no point is."""
    colors = [STYLES[side]["color"] for side in values]
    axes.barh(range(len(values)), values.values(), 0.7, color=colors, alpha=0.5)
    for place, value in enumerate(values.values()):
        axes.annotate(
            form.format(value), (0, place), (4, 0), textcoords="offset points", va="center",
            weight="bold",
        )  # fmt: skip
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def draw_losses(axes, results: dict, tokens_per_step: int) -> None:
    for side, result in results.items():
        if side == "frozen":  # it doesn't train
            continue
        steps, losses = numpy.transpose(result["held_out_loss"])
        tokens = steps * tokens_per_step / 1000
        axes.plot(
            tokens, losses, **STYLES[side], label=name_of(side), fillstyle="none", markersize=8
        )
    axes.set_title("held-out loss, by thousand tokens trained on")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
