"""fastlora's wheel with many versions of its dependencies: ``make matrix``.

    make matrix ARGS="--list"
    make matrix ARGS="-t quick"                 # the oldest and the newest
    make matrix ARGS="-s oldest-torch"
    make matrix ARGS="-s newest-3.13 -- whole"  # also all tests, which read the tree
    make matrix ARGS="-t triton"                # the kernels under each Triton
    make matrix ARGS="-s triton-3.7.1"

Each cell is an environment of its own, and ``cell.py`` runs there.  The results go into
benchmarks/results/matrix.json, beside the results of the other sessions.  From there,
``tests/support/pages.py`` writes the tables of docs/.  nox skips a cell if its Python isn't
installed.
"""

import json
import re
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import NamedTuple

import nox
from nox.command import CommandFailed

sys.path.append(str(Path(__file__).resolve().parents[1]))

from matrix.clone import copy_of_clone
from matrix.table import said
from matrix.tritons import TORCH, VERSIONS, installed

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
NEWEST = ""  # the registry's version on the day
nox.options.envdir = str(ROOT / ".cache" / "nox")
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"


class Cell(NamedTuple):
    """Versions that are installed together.

    The cells don't combine every version with every other; each has a reason, which is its name.
    The extremes are combined: all oldest, all newest, and the oldest of each beside the newest of
    the others.  Each Python has all newest, and each version between the extremes is in one cell.
    The cells for a trainer have versions that it accepts.
    """

    name: str
    python: str
    torch: str = NEWEST
    peft: str = NEWEST
    transformers: str = NEWEST
    numpy: str = NEWEST
    accelerate: str = NEWEST
    trl: str = ""  # not installed

    def requirements(self) -> list[str]:
        names = ("torch", "peft", "transformers", "numpy", "accelerate", "trl")
        return [f"{name}=={own}" for name in names if (own := getattr(self, name))]


OLDEST = Cell("oldest", "3.10", "2.10.0", "0.18.0", "4.57.1", "1.23.5")
CELLS = [
    OLDEST,
    Cell("newest", "3.14"),
    Cell("newest-3.13", "3.13"),
    Cell("newest-3.12", "3.12"),
    Cell("newest-3.11", "3.11"),
    Cell("newest-3.10", "3.10"),
    Cell("oldest-3.14", "3.14", *OLDEST[2:5]),  # its oldest numpy is 2.3
    Cell("oldest-torch", "3.13", torch=OLDEST.torch),
    Cell("oldest-peft", "3.12", peft=OLDEST.peft),
    Cell("oldest-transformers", "3.11", transformers=OLDEST.transformers),
    Cell("oldest-numpy", "3.10", numpy=OLDEST.numpy),
    Cell("newest-torch", "3.10", "", *OLDEST[3:]),
    Cell("torch-2.11", "3.11", "2.11.0", "0.19.1", "4.57.6"),
    Cell("torch-2.12", "3.12", "2.12.1", "0.20.0", "5.0.0", "1.26.4"),
    Cell("torch-2.13", "3.11", "2.13.0"),
    Cell("torch-2.14", "3.13", "2.14.1", "0.21.0", "5.12.1"),
    Cell("for-llamafactory", "3.11", "", "0.18.1", "5.6.0", "", "1.11.0", "0.24.0"),
    Cell("for-unsloth", "3.13", "2.14.1", "0.18.0", "5.5.0", trl="0.24.0"),
]


def run_cell(session: nox.Session, cell: Cell) -> None:
    row: dict = {"asked": cell._asdict(), "date": date.today().isoformat(), "checks": {}}
    whole = "whole" in session.posargs
    with tempfile.TemporaryDirectory() as folder:
        # The wheel is built in a copy, so that building leaves nothing in the checkout.
        source = [f"{copy_of_clone(Path(folder, 'clone'))}[peft,trainer]"]
        if whole:
            source = ["--editable", f"{ROOT}[test,peft,trainer]"]
        try:
            session.install(*source, *cell.requirements())
        except CommandFailed:
            write("cells", cell.name, row | {"why": "can't be installed"})
            raise
        script = shutil.copy(ROOT / "tools" / "matrix" / "cell.py", folder)
        # In the clone, Python would import the clone's folders.
        with session.chdir(folder):
            for group in ([], ["compiled"]):
                with_checks(row, lines_of(session, "python", script, *group), group)
    session.chdir(ROOT)
    if whole:
        line = lines_of(session, "pytest", "-q", "-n", "2", "--dist", "loadfile")[-1].strip("= ")
        row["tests"] = line
        row["checks"]["tests"] = f"error: {line}" if re.search("failed|error", line) else "ok"
    shutil.rmtree(session.virtualenv.location)  # each takes gigabytes
    write("cells", cell.name, row)
    finish(session, said(row), "error" not in said(row))


def lines_of(session: nox.Session, *command: str) -> list[str]:
    """The lines that a command prints, whatever its exit status."""
    own = {"PYTHONPATH": None, "HF_HUB_OFFLINE": "1"}
    codes = range(-64, 256)
    printed = session.run(*command, env=own, silent=True, external=True, success_codes=codes)
    return str(printed).strip().splitlines() or ["nothing"]


def with_checks(row: dict, lines: list[str], group: list[str]) -> None:
    """Add the outcomes that ``cell.py`` printed; a check without a line ended the process."""
    told = [json.loads(line) for line in lines if line.startswith('{"')]
    head = told.pop(0) if told else {"checks": [" ".join(["import", *group])]}
    outcomes = {line["check"]: line["outcome"] for line in told}
    missing = f"error: the process ended: {lines[-1]}"
    row["checks"] |= {name: outcomes.get(name, missing) for name in head.pop("checks")}
    row |= {name: value for name, value in head.items() if name not in row}


def run_triton(session: nox.Session, version: str) -> None:
    """The tests of machine code and of launches, with a Triton beside this environment's torch."""
    session.chdir(ROOT)
    session.env.update(FASTLORA_COMPILE_TRITON=str(installed(version)), FASTLORA_COMPILE_ALL="1")
    row = [", ".join(torch.rpartition(".")[0] for torch, own in TORCH.items() if own == version)]
    for file in ("tests/kernels/test_compile.py", "tests/kernels/test_host.py"):
        lines = lines_of(session, sys.executable, "-m", "pytest", "-q", "-n", "0", file)
        row.append(re.sub(r" in .*", "", lines[-1].strip("= ")))
    write("triton", version, row)
    finish(session, " | ".join(row), not re.search("failed|error", " ".join(row)))


def write(kind: str, name: str, row: dict | list) -> None:
    """A line for each row of the results, in the order of the sessions."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    results[kind][name] = row
    order = [cell.name for cell in CELLS] if kind == "cells" else VERSIONS
    results[kind] = {each: results[kind][each] for each in order if each in results[kind]}
    text = json.dumps(results).replace('{"asked"', '\n{"asked"').replace("]], ", "]],\n")
    RESULTS.write_text(f"{text}\n", encoding="utf-8")


def finish(session: nox.Session, text: str, passed: bool) -> None:
    session.log(text) if passed else session.error(text)


for cell in CELLS:
    tags = ["quick"] if cell.name in ("oldest", "newest") else []
    run = nox.session(name=cell.name, python=cell.python, tags=tags)
    run(lambda session, cell=cell: run_cell(session, cell))
for version in VERSIONS:
    run = nox.session(name=f"triton-{version}", python=False, tags=["triton"], default=False)
    run(lambda session, version=version: run_triton(session, version))
