"""fastlora's wheel with many versions of its dependencies: ``make matrix``.

Each cell (``cells.py``) is a separate environment that runs ``cell.py``.  The results go into
benchmarks/results/matrix.json, which keeps the results of other cells, and from there into docs/.
A cell whose Python is missing is printed, but is no failure.  Any failure gives an exit status
other than 0.
"""

import argparse
import json
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path

from . import environment, tritons
from .cells import CELLS, Cell
from .environment import ROOT, run
from .table import rewrite, said

PAGES = (ROOT / "docs" / "install.md", ROOT / "docs" / "kernels.md")
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
SCRIPT = Path(__file__).with_name("cell.py")


def checked(python: Path) -> dict:
    """The outcomes of ``cell.py`` in this environment; a check without a line ended the process."""
    row: dict = {"date": date.today().isoformat(), "checks": {}}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SCRIPT, folder)
        for group in ((), ("compiled",)):
            _, lines = run(python, "cell.py", *group, cwd=Path(folder))
            told = [json.loads(line) for line in lines if line.startswith('{"')]
            head = told.pop(0) if told else {"checks": [" ".join(["import", *group])]}
            outcomes = {line["check"]: line["outcome"] for line in told}
            missing = f"error: the process ended: {lines[-1]}"
            row["checks"] |= {name: outcomes.get(name, missing) for name in head.pop("checks")}
            row = head | row
    return row


def result(cell: Cell, whole: bool, keep: bool) -> dict:
    """A cell's row: its checks, or the reason why there are none."""
    row, python = {"asked": cell._asdict()}, environment.interpreter(cell.python)
    if python is None:
        return row | {"why": f"Python {cell.python} is not here"}
    own, why = environment.install(cell, python, whole)
    try:
        if why:
            return row | {"why": why}
        row |= checked(own)
        if whole:
            passed, lines = run(own.with_name("pytest"), "-q", "-n", "2", "--dist", "loadfile")
            row["checks"]["tests"] = "ok" if passed else f"error: {lines[-1].strip('= ')}"
            row["tests"] = lines[-1].strip("= ")
        return row
    finally:
        if not keep:
            shutil.rmtree(environment.FOLDER / cell.name, ignore_errors=True)


def write(results: dict, kind: str, name: str, row: dict | list) -> None:
    """Write the file, with a line for each row, and the tables."""
    results[kind][name] = row
    order = [cell.name for cell in CELLS] if kind == "cells" else tritons.VERSIONS
    results[kind] = {each: results[kind][each] for each in order if each in results[kind]}
    text = json.dumps(results).replace('{"asked"', '\n{"asked"').replace("]], ", "]],\n")
    RESULTS.write_text(f"{text}\n", encoding="utf-8")
    for page in PAGES:
        rewrite(page)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__.split("\n")[0])
    names = [cell.name for cell in CELLS]
    add = parser.add_argument
    add("--cell", nargs="+", default=names, choices=names, metavar="NAME", help="these alone")
    add("--quick", action="store_true", help="only the oldest and the newest cell")
    add(
        "--whole", action="store_true", help="also run all tests in one cell: --cell, or the newest"
    )
    add("--keep", action="store_true", help="don't remove the environments afterwards")
    add("--list", action="store_true", help="print the cells, and run nothing")
    add("--json", action="store_true", help="print JSON for a workflow")
    add(
        "--triton",
        nargs="*",
        choices=tritons.VERSIONS,
        metavar="X.Y.Z",
        help="test only the kernels",
    )
    options = parser.parse_args()
    chosen = [cell for cell in CELLS if cell.name in options.cell]
    if options.quick:
        chosen = [cell for cell in chosen if cell.name in ("oldest", "newest")]
    if options.list:
        rows = [cell._asdict() for cell in chosen]
        named = [{key: own or "newest" for key, own in row.items()} for row in rows]
        print(json.dumps(rows) if options.json else "\n".join(map(str, named)))
        return 0
    if options.whole and len(chosen) > 1:
        newest = [cell for cell in CELLS if cell.name.startswith("newest")]
        chosen = [cell for cell in newest if environment.interpreter(cell.python)][:1]
    results = {"cells": {}, "triton": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    good = True
    if options.triton is not None:
        for version in options.triton or tritons.VERSIONS:
            passed, columns = tritons.row(version)
            good &= passed
            print(version, *columns, sep=" | ", flush=True)
            write(results, "triton", version, columns)
        return not good
    for cell in chosen:
        row = result(cell, options.whole, options.keep)
        print(f"{cell.name}: {row.get('why') or said(row)}", flush=True)
        why, outcomes = row.get("why", ""), row.get("checks", {}).values()
        good &= "is not here" in why or (not why and not any("error" in o for o in outcomes))
        write(results, "cells", cell.name, row)
    return not good


if __name__ == "__main__":
    sys.exit(main())
