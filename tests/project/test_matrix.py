"""tools/matrix: its cells, its table, and the record of a cell that fails."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import __main__ as matrix
from matrix import environment, table
from matrix.cells import CELLS, NEWEST, OLDEST, TORCH

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
RESULTS = json.loads(matrix.RESULTS.read_text(encoding="utf-8"))
RAN = {name: row for name, row in RESULTS["cells"].items() if "versions" in row}
CHECKS = set(RAN["oldest"]["checks"])


def floor_of(package: str) -> str:
    """The lowest minimum version in pyproject.toml; the demo and benchmarks require newer ones."""
    found = re.findall(rf'"{package}>=([\d.]+)', PROJECT)
    return min(found, key=lambda floor: [int(number) for number in floor.split(".")])


@pytest.mark.parametrize("package", ["torch", "peft", "transformers", "numpy"])
def test_the_oldest_cell_has_the_floors(package):
    oldest = getattr(OLDEST, package)
    assert f"{oldest}.".startswith(f"{floor_of(package)}.")
    assert RAN["oldest"]["versions"][package].startswith(f"{oldest}")


def test_the_oldest_python_and_triton_are_the_floors():
    assert f'requires-python = ">={OLDEST.python}"' in PROJECT
    assert TORCH[OLDEST.torch].startswith(f"{floor_of('triton')}.")


def test_the_cells_have_every_value_and_join_the_extremes():
    assert len(CELLS) >= 14
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    newest = {cell.python for cell in CELLS if cell[2:] == (NEWEST,) * 4}
    assert newest == {"3.10", "3.11", "3.12", "3.13", "3.14"}
    # The newest torch may be newer than the versions named here.
    assert {cell.torch for cell in CELLS} == {*list(TORCH)[:-1], NEWEST}
    for own in ("torch", "peft", "transformers", "numpy"):
        oldest = getattr(OLDEST, own)
        alone = [cell for cell in CELLS if cell.requirements() == [f"{own}=={oldest}"]]
        assert alone, f"no cell has the oldest {own} with the newest others"


def test_twelve_cells_ran_and_every_torch_had_the_triton_that_it_pins():
    assert len(RAN) >= 12
    for row in RAN.values():
        found = row["versions"]
        assert TORCH[found["torch"].partition("+")[0]] == found["triton"]
        assert set(row["checks"]) >= CHECKS


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path) -> Path:
    """The file of results, without any page to update."""
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "matrix.json")
    monkeypatch.setattr(matrix, "PAGES", [])
    return matrix.RESULTS


ENDED, TWO = "error: the process ended: ", dict.fromkeys(("doctor", "files"), "ok")


@pytest.mark.parametrize(
    ("names", "told", "checks", "said"),
    [
        (TWO, {"doctor": "ok", "files": "error: Oh: no"}, {"files": "error: Oh: no"}, "files: Oh"),
        (TWO, {"doctor": "ok"}, {"files": f"{ENDED}Segmentation fault"}, "files: the process"),
        ((), {}, dict.fromkeys(("import", "import compiled"), f"{ENDED}Segmentation fault"), ""),
    ],
    ids=["a-broken-check", "a-process-that-ends", "packages-that-cannot-be-imported"],
)
def test_a_failing_check_is_recorded_in_its_cell(
    nothing_installed, monkeypatch, names, told, checks, said
):
    lines = [json.dumps({"checks": [*names], "versions": {}})] * bool(names)
    lines += [json.dumps({"check": name, "outcome": outcome}) for name, outcome in told.items()]
    monkeypatch.setattr(environment, "interpreter", lambda version: "python")
    monkeypatch.setattr(environment, "install", lambda *_: (Path("python"), ""))
    monkeypatch.setattr(matrix, "run", lambda *_, **how: (False, [*lines, "Segmentation fault"]))
    monkeypatch.setattr(sys, "argv", ["matrix", "--cell", "newest"])
    assert matrix.main()
    row = json.loads(nothing_installed.read_text())["cells"]["newest"]
    assert row["checks"] == told | checks
    assert said in table.said(row)


def test_a_python_that_is_not_here_is_told_and_no_failure(nothing_installed, monkeypatch):
    monkeypatch.setattr(environment, "interpreter", lambda version: None)
    monkeypatch.setattr(sys, "argv", ["matrix", "--quick"])
    assert not matrix.main()
    cells = json.loads(nothing_installed.read_text())["cells"]
    line = "| 3.14 | newest | torch's | newest | newest | newest | Python 3.14 is not here |"
    assert line in table.cells({"cells": cells})


def test_the_list_is_json_and_needs_only_python():
    command = [sys.executable, "-S", "-m", "tools.matrix", "--list", "--json", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [cell["name"] for cell in json.loads(done.stdout)] == ["oldest", "newest"]


def test_a_cell_s_checks_pass_here():
    names = ["op, torch", "files, biases"]
    command = [sys.executable, str(matrix.SCRIPT), *names]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert [(line["check"], line["outcome"]) for line in told[1:]] == [(n, "ok") for n in names]
