"""The tables of docs/, as in ``python tools/matrix/table.py benchmarks/results/matrix.json cells``.

This file needs only Python.
"""

import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from report import pipes

ROOT = Path(__file__).parents[2]
NAMES = ("Python", "torch", "triton", "peft", "transformers", "numpy")
_TABLES = re.compile(r"(<!-- tools/matrix/table\.py (\S+) (\w+) -->\n\n).*?\n(?=\n|\Z)", re.S)


def said(row: dict) -> str:
    """A cell's failures and skips, in a line."""
    found: dict[str, list[str]] = {"ok": [], "error": [], "skipped": []}
    for name, outcome in row["checks"].items():
        kind, _, why = outcome.partition(": ")
        told = name if kind == "skipped" else f"{name}: {why}"
        found[kind].append(told.replace("|", "\\|"))
    good, count = len(found["ok"]), len(row["checks"])
    done = f"all {count}" if good == count else f"{good} of {count}"
    bad = [f"{kind}: {each}" for kind in ("error", "skipped") for each in found[kind]]
    return "; ".join([done, *bad])


def cells(results: dict) -> str:
    """A line for each cell, also for cells that could not run."""
    lines = [("Python", "PyTorch", "Triton", "PEFT", "transformers", "NumPy", "checks")]
    for row in results["cells"].values():
        asked = {name.lower(): own or "newest" for name, own in row["asked"].items()}
        asked |= {"Python": asked["python"], "triton": "torch's"}
        found = row.get("versions", asked)
        lines.append((*(found[name] for name in NAMES), row.get("why") or said(row)))
    return pipes(lines)


def triton(results: dict) -> str:
    """A line for each Triton, with the tests that passed."""
    lines = [("Triton", "pinned by torch", "compiled", "launched")]
    for version, row in results["triton"].items():
        lines.append((version, *row))
    return pipes(lines)


def rewrite(page: Path) -> None:
    """Rewrite every such table of a page from the current results."""

    def new(found: re.Match) -> str:
        results = json.loads((ROOT / found[2]).read_text(encoding="utf-8"))
        return f"{found[1]}{globals()[found[3]](results)}\n"

    text = page.read_text(encoding="utf-8")
    page.write_text(_TABLES.sub(new, text), encoding="utf-8")


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print({"cells": cells, "triton": triton}[sys.argv[2]](found))
