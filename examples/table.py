"""The results of a demo as Markdown, as in ``python examples/table.py out/loss.json``.

And those of a sweep (sweep.json).  It needs Python alone.
"""

import json
import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from report import pipes


def table(report: dict) -> str:
    """A column for each side, and its ratios to PEFT."""
    results, step_time = report["results"], report.get("step_time_over_peft")
    rows = (
        ("held-out loss before", lambda side: side["held_out_loss"][0][1], "{:.3f}"),
        ("held-out loss after", lambda side: side["held_out_loss"][-1][1], "{:.3f}"),
        ("tokens / s, median step", lambda side: side["tokens_per_second"], "{:.0f}"),
        ("weights resident, MiB", lambda side: side["weights_resident"] / 2**20, "{:.0f}"),
        ("peak memory growth, MiB", lambda side: side["peak_memory_growth"] / 2**20, "{:.0f}"),
        ("kept for the backward, MiB", lambda side: side["kept_for_backward"] / 2**20, "{:.0f}"),
    )
    # Results of before it was counted have no weights.
    rows = [row for row in rows if "weights" not in row[0] or "weights_resident" in results["PEFT"]]
    names, sides = {side: name_of(side) for side in results}, list(results)
    others = [side for side in sides if side != "PEFT"]
    lines = [("", *(names[side] for side in sides), *(f"{names[side]} / PEFT" for side in others))]
    for title, value, form in rows:
        values = {side: value(results[side]) for side in sides}
        cells = [form.format(values[side]) for side in sides]
        by_pairs = step_time and title.startswith("tokens")  # its ratio is a row of its own
        cells += ["" if by_pairs else f"{values[side] / values['PEFT']:.2f}" for side in others]
        lines.append((title, *cells))
    if step_time:
        title = "step time / PEFT's, median of pairs (quartiles)"
        cells = [""] * len(sides)
        for side in others:
            low, high = step_time[side]["quartiles"]
            cells.append(f"{step_time[side]['median']:.3f} ({low:.3f}–{high:.3f})")
        lines.append((title, *cells))
    return pipes(lines)


def name_of(side: str) -> str:
    """Those that are called after their base are fastlora's."""
    known = {"fastlora": "fastlora", "PEFT": "PEFT", "optimized": "PEFT, optimized"}
    return known.get(side, f"fastlora, {side}")


def sweep_table(report: dict) -> str:
    """A line for each trial, the best first."""
    lines = [("rank", "learning rate", "parameters", "MiB", "held-out loss", "steps")]
    losses = [trial["losses"][-1][1] for trial in report["trials"]]  # None for NaN and infinity
    by_loss = sorted((math.inf if loss is None else loss, i) for i, loss in enumerate(losses))
    for loss, i in by_loss:
        trial = report["trials"][i]
        lines.append((
            str(trial["config"]["r"]), f"{trial['learning_rate']:g}", f"{trial['parameters']:,}",
            f"{trial['bytes'] / 2**20:.1f}", f"{loss:.3f}", str(trial["steps"]),
        ))  # fmt: skip
    return pipes(lines)


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(sweep_table(report) if "trials" in report else table(report))
