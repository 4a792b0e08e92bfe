"""Print the compatibility tables of docs/: ``python tools/matrix/table.py RESULTS.json TABLE``.

RESULTS.json is benchmarks/results/matrix.json.  TABLE is ``cells`` (a line for each combination of
versions) or ``triton``.  This file needs no package.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from report import pipes

NAMES = ("Python", "torch", "triton", "peft", "transformers", "numpy", "accelerate", "trl")


def said(row: dict) -> str:
    """How many checks of a cell passed, and its failures and skips, in a line."""
    by_kind: dict[str, list[str]] = {"ok": [], "error": [], "skipped": []}
    for name, outcome in row["checks"].items():
        kind, _, why = outcome.partition(": ")
        text_of_check = name if kind == "skipped" else f"{name}: {why}"
        by_kind[kind].append(text_of_check.replace("|", "\\|"))
    good, count = len(by_kind["ok"]), len(row["checks"])
    done = f"all {count}" if good == count else f"{good} of {count}"
    bad = [f"{kind}: {each}" for kind in ("error", "skipped") for each in by_kind[kind]]
    return "; ".join([done, *bad])


def cells(results: dict) -> str:
    """A line for each cell, also for cells that could not run, with the requested versions."""
    titles = ("Python", "PyTorch", "Triton", "PEFT", "transformers", "NumPy", "accelerate", "TRL")
    lines = [(*titles, "checks")]
    for row in results["cells"].values():
        asked = {name.lower(): own or "newest" for name, own in row["asked"].items()}
        asked |= {"Python": asked["python"], "triton": "torch's"}
        versions = row.get("versions", asked)
        lines.append((*(versions.get(name, "–") for name in NAMES), row.get("why") or said(row)))
    return pipes(lines)


def triton(results: dict) -> str:
    """A line for each Triton, with the tests that passed."""
    head = ("Triton", "pinned by torch", "compiled", "launched")
    return pipes([head, *((version, *row) for version, row in results["triton"].items())])


if __name__ == "__main__":
    matrix = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print({"cells": cells, "triton": triton}[sys.argv[2]](matrix))
