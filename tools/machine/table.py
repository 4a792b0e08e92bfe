"""The table of the emulator's cases: ``python tools/machine/table.py RESULTS.json``.

It has a line for each Triton and set of cases, and a column for each card.  This file needs only
Python.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from report import pipes

USUAL = "--quick --share 8"  # words that the table omits
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "machine.json"


def add(cases: str, version: str, cards: dict[str, dict[str, int]]) -> None:
    """Add the counts of results of these cases on each card with one Triton.

    They replace the counts of the same cases.
    """
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    rows = [row for row in rows if (row["cases"], row["triton"]) != (cases, version)]
    rows.append({"triton": version, "cases": cases, "cards": cards})
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: (row["cases"], row["triton"]))]
    RESULTS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def said(counts: dict[str, int]) -> str:
    """``17 ok, 1 MISS``."""
    return ", ".join(f"{count} {result}" for result, count in counts.items())


def table(rows: list[dict]) -> str:
    """The Markdown table.  Bare numbers count correct cases."""
    cards = [*dict.fromkeys(name for row in rows for name in row["cards"])]
    lines = [("Triton", *cards)]
    for row in rows:
        cells = [said(row["cards"].get(name, {})).removesuffix(" ok") for name in cards]
        lines.append((f"{row['triton']}{row['cases'].removeprefix(USUAL)}", *cells))
    return pipes(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
