"""tools/matrix: its cells, its table, and the record of a cell that fails."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from matrix import noxfile, table
from matrix.noxfile import CELLS, OLDEST, TORCH

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CELLS_THAT_RAN = json.loads(noxfile.RESULTS.read_text(encoding="utf-8"))["cells"]


def floor_of(package: str) -> str:
    """The lowest minimum version in pyproject.toml; the demo and benchmarks require newer ones."""
    found = re.findall(rf'"{package}>=([\d.]+)', PROJECT)
    return min(found, key=lambda floor: [int(number) for number in floor.split(".")])


def test_the_oldest_cell_has_the_floors_and_each_cell_the_pinned_triton():
    assert f'requires-python = ">={OLDEST.python}"' in PROJECT
    assert TORCH[OLDEST.torch].startswith(f"{floor_of('triton')}.")
    assert f"\"triton-windows>={floor_of('triton')}; sys_platform == 'win32'\"" in PROJECT
    for package in ("torch", "peft", "transformers", "numpy"):
        assert f"{getattr(OLDEST, package)}.".startswith(f"{floor_of(package)}.")
    assert [*CELLS_THAT_RAN] == [cell.name for cell in CELLS]
    for row in CELLS_THAT_RAN.values():
        found = row["versions"]
        assert TORCH[found["torch"].partition("+")[0]] == found["triton"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"doctor": "ok", "files": "error: Oh: no"}, "1 of 2; error: files: Oh: no"),
        ({"doctor": "ok"}, "1 of 2; error: files: the process ended: Segmentation fault"),
        ({"doctor": "ok", "files": "ok"}, "all 2"),
    ],
    ids=["a-broken-check", "a-process-that-ends", "ok"],
)
def test_a_failing_check_is_recorded_in_its_cell(monkeypatch, tmp_path, told, said):
    results = tmp_path / "matrix.json"
    results.write_text('{"cells": {}, "triton": {}}')
    monkeypatch.setattr(noxfile, "RESULTS", results)
    lines = [json.dumps({"checks": ["doctor", "files"], "versions": {}})]
    lines += [json.dumps({"check": name, "outcome": outcome}) for name, outcome in told.items()]
    (tmp_path / "environment").mkdir()
    session = MagicMock(posargs=[])
    session.virtualenv.location = tmp_path / "environment"
    session.run.return_value = "\n".join([*lines, "Segmentation fault"])
    noxfile.run_cell(session, CELLS[1])
    assert table.said(json.loads(results.read_text())["cells"]["newest"]) == said
    assert session.error.called == ("error" in said)


def test_nox_has_a_session_for_each_cell_and_triton():
    command = [sys.executable, "-m", "nox", "-f", noxfile.__file__, "--list", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [(session["name"], session["python"]) for session in json.loads(done.stdout)]
    assert listed == [(cell.name, cell.python) for cell in CELLS]


def test_a_cell_s_checks_pass_here():
    names = ["op, torch", "files, biases"]
    command = [sys.executable, str(Path(noxfile.__file__).with_name("cell.py")), *names]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert [(line["check"], line["outcome"]) for line in told[1:]] == [(n, "ok") for n in names]
