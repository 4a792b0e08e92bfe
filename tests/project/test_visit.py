"""benchmarks/visit.py, which must work at the first try when a GPU is at hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.judge import TOLERANCE
from fastlora.kernels.gemm_lowrank import GemmConfig
from fastlora.kernels.plan import Plan, Row

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "visit.py")]


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[str, dict]:
    """A whole dry visit: what it printed, and its results.

    It starts in another folder: the repository's is found by the file's place alone.
    """
    out = tmp_path_factory.mktemp("visit")
    command = [*COMMAND, "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (out / "dry").glob("*.json")
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_every_item_gives_rows_and_no_failure(dry):
    rows = dry[1]["rows"]
    assert {row["table"] for row in rows} == {"tests", "gpu", "tune"}
    assert [row for row in rows if row.get("failures") or row.get("skipped")] == []


def test_who_is_timed_was_judged(dry):
    rows = [row for row in dry[1]["rows"] if row["table"] == "gpu"]
    assert rows
    for row in rows:
        assert {"frozen", "fused", "in place", "peft", "fastlora"} <= set(row["errors"])
        assert max(row["errors"].values()) <= TOLERANCE[torch.bfloat16]
        for seconds in row["seconds"].values():
            assert set(seconds) == set(row["errors"])


def test_tests_run(dry):
    outcomes = {row["id"]: row["outcome"] for row in dry[1]["rows"] if row["table"] == "tests"}
    assert "passed" in outcomes["config"]


def test_tuning_chooses_among_what_it_tried(dry):
    rows = [row for row in dry[1]["rows"] if row["table"] == "tune"]
    assert {row["kernel"] for row in rows} == {"project", "gemm_lowrank", "weight_grad"}
    for row in rows:
        assert row["tried"] == row["candidates"] == 2
        times = {name: seconds for name, seconds in row["seconds"].items() if name != "in place"}
        assert row["best"] == min(times, key=times.get)


def test_plan_rows_are_printed_as_python(dry):
    printed, results = dry
    plans = [row["plan"] for row in results["rows"] if row.get("kernel") == "gemm_lowrank"]
    assert plans
    for text in plans:
        row = eval(text, {"Row": Row, "Plan": Plan, "GemmConfig": GemmConfig})
        assert isinstance(row, Row)
        assert repr(row) == text
        assert f"{text}," in printed.splitlines()


def test_a_visit_that_is_killed_leaves_a_whole_file(tmp_path):
    command = [*COMMAND, "--dry", "--only", "tune", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("dry/*.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    [path] = tmp_path.glob("dry/*.json")
    assert json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_what_there_is_no_time_for_is_said(tmp_path):
    command = [*COMMAND, "--dry", "--minutes", "0", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    [path] = (tmp_path / "dry").glob("*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["table"] for row in rows} == {"tests", "layers", "tune"}
    assert all(row["skipped"] == {"time": "none was left"} for row in rows)


def test_a_part_that_ends_its_process_costs_only_itself(tmp_path, monkeypatch):
    from benchmarks import visit

    monkeypatch.setattr(visit.sys, "argv", ["visit.py", "--dry", "--out", str(tmp_path)])
    a_visit = visit.Visit(visit.parse())
    case = next(name for kind, name in visit.parts(a_visit.device) if kind == "layers")
    ask, seconds = a_visit.worker.ask, iter([0.0, 60.0])
    monkeypatch.setattr(a_visit.worker, "ask", lambda *part, **_: ask(*part, seconds=next(seconds)))
    a_visit.run("layers", case)
    a_visit.run("layers", case)
    a_visit.worker.close()
    died, judged = json.loads(a_visit.path.read_text(encoding="utf-8"))["rows"]
    assert died["id"] == judged["id"] == case
    assert "the process ended with -9" in died["failures"]["the process"]
    assert judged["failures"] == {}
    assert judged["rounds"] == 1


def test_dry_numbers_stay_out_of_the_results():
    out = ROOT / "benchmarks" / "results" / "some-device"
    command = [*COMMAND, "--dry", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "don't belong in benchmarks/results" in done.stderr
    assert not out.exists()


def test_the_interpreter_is_for_dry_visits_only(monkeypatch):
    from benchmarks.visit import environment

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment(dry=False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert environment(dry=True)["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in os.environ
