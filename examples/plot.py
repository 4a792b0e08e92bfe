"""Draw a demo's results: held-out loss, time of a step, memory.

python plot.py loss.json loss.png
"""

import json
import sys
from pathlib import Path

import matplotlib

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
    title = "time of a step / PEFT's, in pairs" if over_peft else "seconds of a step"
    seconds = {side: result["seconds_per_step"] for side, result in results.items()}
    points = {side: ratios["pairs"] for side, ratios in over_peft.items()} or seconds
    for place, (side, values) in enumerate(points.items()):
        color = STYLES[side][0]
        spread = [place + 0.3 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axes.plot(spread, values, ".", color=color, alpha=0.4)
        if over_peft:
            low, high = over_peft[side]["quartiles"]
            axes.plot([place - 0.3, place + 0.3], 2 * [over_peft[side]["median"]], color=color)
            axes.fill_between([place - 0.3, place + 0.3], low, high, color=color, alpha=0.2)
            axes.annotate(
                f"{over_peft[side]['median']:.2f}",
                (place + 0.32, over_peft[side]["median"]),
                va="center",
            )
    if over_peft:
        axes.axhline(1, color="C1", linestyle="--")
    axes.set_xticks(range(len(points)), [NAMES.get(side, side) for side in points])
    axes.set(title=title, xlim=(-0.6, len(points) - 0.4), ylim=(0, None))


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
