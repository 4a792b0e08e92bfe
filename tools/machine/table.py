"""The table of the emulator's cases: ``python tools/machine/table.py RESULTS.json``.

It has a line for each Triton and set of cases, and a column for each card.  This file needs only
Python.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from report import pipes

USUAL = "--quick"  # a word that the table doesn't say
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "machine.json"


def add(cases: str, version: str, commit: str, cards: dict[str, dict[str, int]]) -> None:
    """Save the counts of each result on each card, for cases that these words chose.

    They replace the counts of the same cases under the same Triton.  Counts of other cards stay if
    they belong to the same commit.
    """
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    same = [row for row in rows if (row["cases"], row["triton"]) == (cases, version)]
    rows = [row for row in rows if row not in same]
    for row in same:
        cards = {**row["cards"], **cards} if row["commit"] == commit[:7] else cards
    rows.append({"triton": version, "cases": cases, "commit": commit[:7], "cards": cards})
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: (row["cases"], row["triton"]))]
    RESULTS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def said(counts: dict[str, int]) -> str:
    """``17 ok, 1 MISS``."""
    return ", ".join(f"{count} {result}" for result, count in counts.items())


def table(rows: list[dict]) -> str:
    """The Markdown table.  Bare numbers count correct cases."""
    cards = [*dict.fromkeys(name for row in rows for name in row["cards"])]
    lines = [("Triton", "commit", *cards)]
    for row in rows:
        cells = [said(row["cards"].get(name, {})).removesuffix(" ok") for name in cards]
        words = row["cases"].split()
        words = words[1:] if words[:1] == [USUAL] else ["all cases", *words]
        lines.append((" ".join([row["triton"], *words]), row["commit"], *cells))
    return pipes(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
