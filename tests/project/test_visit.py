"""benchmarks/visit.py must work at the first try when a GPU is available for a short time.

A dry visit (``--dry``) runs all parts on a CPU, with tiny sizes and Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from process import run_python

from benchmarks.judge import TOLERANCE
from fastlora.backends.triton import measured

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "visit.py")]


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[str, dict, str]:
    """A complete dry visit: its output, its results, and its tuning file.

    It starts in another folder, so it must find the repository by the script's own path.
    """
    folder = tmp_path_factory.mktemp("visit")
    out = folder / "visit.json"
    command = [*COMMAND, "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text()), (folder / "visit.tuning.json").read_text()


def test_every_part_gives_a_row_and_no_failure(dry):
    rows = dry[1]["rows"]
    assert {row["table"] for row in rows} == {"calls", "compile", "gpu", "tune", "tests"}
    assert [row for row in rows if row.get("failures") or row.get("skipped")] == []
    outcomes = {row["id"]: row["outcome"] for row in rows if row["table"] == "tests"}
    assert " passed" in outcomes["capture"]


def test_a_gpu_s_own_parts_raise_nothing_on_the_standin(tmp_path, monkeypatch):
    """The parts for GPUs, without the tests; everything above the driver is real."""
    from benchmarks import visit

    out = tmp_path / "visit.json"
    support, other_triton = ROOT / "tests" / "support", os.getenv("FASTLORA_COMPILE_TRITON", "")
    path = os.pathsep.join(filter(None, (str(support), other_triton)))
    why_not = "import cuda_standin; print(cuda_standin.why_not())"
    if reason := run_python("-c", why_not, PYTHONPATH=path, TRITON_INTERPRET=None):
        pytest.skip(reason)
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")  # the default on a GPU
    monkeypatch.setattr(sys, "argv", ["visit.py", "--dry", "--out", str(out)])
    visit.Visit(visit.parse(), "visit_standin").run()
    on_the_standin = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row for row in on_the_standin if row.get("failures") or row.get("skipped")] == []
    tables = [row["table"] for row in on_the_standin]
    assert set(tables) == {"calls", "compile", "gpu", "tune"}
    assert tables[:3] == ["calls"] * 3  # the most important measurements come first
    for row in on_the_standin:
        assert (row["launches"] > 0) == (row["table"] != "compile")
    [row] = [row for row in on_the_standin if row["table"] == "compile"]
    layers = tables.count("gpu")
    assert row["outcome"] == f"{2 * layers} of {2 * layers} ended in time"


def test_every_timed_contestant_was_checked(dry):
    rows = [row for row in dry[1]["rows"] if row["table"] == "gpu"]
    assert rows
    for row in rows:
        assert {"frozen", "fused", "in place", "peft", "fastlora"} <= set(row["errors"])
        assert max(row["errors"].values()) <= TOLERANCE[torch.bfloat16]
        for seconds in row["seconds"].values():
            assert set(seconds) == set(row["errors"])


def test_tuning_chooses_among_what_it_tried_and_writes_what_fastlora_reads(dry):
    results, file = dry[1:]
    rows = [row for row in results["rows"] if row["table"] == "tune"]
    assert {row["id"].split()[0] for row in rows} == {"y", "dx", "h", "dA", "dB,dh"}
    for row in rows:
        assert row["tried"] == 2
        times = {name: t for name, t in row["seconds"].items() if name[:1].isdigit()}
        assert row["best"] == min(times, key=times.get)
    plans = [row["plan"] for row in results["rows"] if "plan" in row]
    found = measured.from_text(file)
    assert found.why_not == ""
    assert {row.backward for row in found.rows} == {False, True}
    assert {row.plan.gemm is not None for row in found.rows if row.plan.fused} <= {True}
    assert set(found.rows) <= set(map(measured.as_row, plans))
    # y of three depths and dx of two; the measurements of tuning come last
    assert len(found.rows) == 5


def test_a_call_that_is_wrong_or_raises_has_no_time(monkeypatch):
    """All other calls have times."""
    from benchmarks.calls import reached
    from benchmarks.forms import Form, Operands

    def in_place(self, adapter_first=True):
        if not adapter_first:
            raise RuntimeError("out of resource: shared memory")
        return [self.out.zero_()]

    monkeypatch.setattr(Operands, "run_in_place", in_place)
    row = reached(Form("y", 34, 48, (16,), (40,)), torch.device("cpu"))
    assert "from the oracle, beyond" in row["failures"]["in place"]
    assert "out of resource" in row["failures"]["in place, adapter last"]
    assert set(row["seconds"]) == {row["default"], "mm", "addmm"}


def test_a_dry_visit_s_numbers_and_interpreter_are_its_own(monkeypatch, capsys):
    from benchmarks.visit import environment, parse

    out = ROOT / "benchmarks" / "results" / "some-device.json"
    monkeypatch.setattr(sys, "argv", ["visit.py", "--dry", "--out", str(out)])
    with pytest.raises(SystemExit):
        parse()
    assert "don't belong in benchmarks/results" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment(dry=False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert environment(dry=True)["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in os.environ
