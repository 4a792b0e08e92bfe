"""The results of a demo or a sweep as Markdown: ``python examples/table.py out/loss.json``.

For a sweep, pass its sweep.json.  This file needs only Python's standard library.
"""

import json
import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from report import pipes

# The sides that step times are compared with, and their names in the table.
OVER = {"PEFT": "PEFT's", "frozen": "the frozen model's"}


def rows_of(report: dict) -> list[tuple[str, ...]]:
    """A table with a column for each side.  Ratios of bytes compare with PEFT."""
    results = report["results"]
    lines = [("", *map(name_of, results))]
    for base, whose in OVER.items():
        # Old results have no frozen side, and so no ratios to it.
        if ratios := report.get(f"step_time_over_{base.lower()}"):
            cells = ["1" if side == base else with_quartiles(ratios[side]) for side in results]
            lines.append((f"step / {whose}, median of pairs (quartiles)", *cells))
    for title, value, form in (
        ("tokens / s, median step", lambda side: side["tokens_per_second"], "{:.0f}"),
        ("held-out loss before", lambda side: side["held_out_loss"][0][1], "{:.3f}"),
        ("held-out loss after", lambda side: side["held_out_loss"][-1][1], "{:.3f}"),
    ):
        lines.append((title, *(form.format(value(result)) for result in results.values())))
    for title, name in (
        ("weights resident, MiB", "weights_resident"),
        ("peak memory growth, MiB", "peak_memory_growth"),
        ("kept for the backward, MiB", "kept_for_backward"),
    ):
        values = {side: result.get(name) for side, result in results.items()}
        title += " (/ PEFT's)" * ("PEFT" in results)
        if name != "weights_resident" or len(set(values.values())) > 1:  # equal numbers say nothing
            lines.append((title, *(in_mib(values, side) for side in values)))
    return lines


def sentence_of(report: dict) -> str:
    """The comparison with PEFT in one sentence; "" in a run without PEFT.

    A step counts as neither faster nor slower if 1 is between the quartiles of its ratio to PEFT's.
    Held-out losses that differ by at most 0.5 % count as the same, because other dropout masks
    change them as much.
    """
    results, ratios = report["results"], report.get("step_time_over_peft")
    if not ratios:
        return ""
    ours, theirs, over = results["fastlora"], results["PEFT"], ratios["fastlora"]
    ratio, (low, high) = over["median"], over["quartiles"]
    faster = f"{1 / ratio:.2f} × faster" if ratio < 1 else f"{ratio:.2f} × slower"
    said = ["neither faster nor slower (the steps vary too much)" if low <= 1 <= high else faster]
    growth = ours["peak_memory_growth"], theirs["peak_memory_growth"]
    if None not in growth:
        saved = round(100 * (1 - growth[0] / growth[1]))
        said.append(f"{abs(saved)} % {'less' if saved >= 0 else 'more'} memory for training")
    loss, peft_s = (each["held_out_loss"][-1][1] for each in (ours, theirs))
    same = abs(loss - peft_s) <= 0.005 * abs(peft_s)
    said.append(f"{'the same' if same else 'another'} held-out loss ({loss:.3f}, {peft_s:.3f})")
    return f"fastlora, compared with PEFT: {', '.join(said)}"


def with_quartiles(ratio: dict) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.3f} ({low:.3f}–{high:.3f})"


def in_mib(values: dict[str, int | None], side: str) -> str:
    if values[side] is None:
        return "not known"
    over = f" ({values[side] / values['PEFT']:.2f})" if side != "PEFT" and "PEFT" in values else ""
    return f"{values[side] / 2**20:.0f}{over}"


def name_of(side: str) -> str:
    """A side's name in tables.  A side with the name of its base runs fastlora."""
    if side == "optimized":  # of 0.4 and older
        return "PEFT, optimized"
    return side if side in ("frozen", "fastlora", "PEFT") else f"fastlora, {side}"


def sweep_table(report: dict) -> str:
    """A table with a line for each trial, the best first."""
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
    print(sweep_table(report) if "trials" in report else pipes(rows_of(report)))
