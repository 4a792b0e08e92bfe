"""benchmarks/visit.py, which must work at the first try when a GPU is at hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from process import run_python

from benchmarks.judge import TOLERANCE
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.plan import Plan, Row

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "visit.py")]


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[str, dict]:
    """A whole dry visit: what it printed, and its results.

    It starts in another folder: the repository's is found by the file's place alone.
    """
    folder = tmp_path_factory.mktemp("visit")
    out = folder / "visit.json"
    command = [*COMMAND, "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def on_the_standin(tmp_path_factory) -> list[dict]:
    """The rows of a GPU's own parts, without its tests; everything above the driver is real."""
    from benchmarks import visit

    out = tmp_path_factory.mktemp("visit") / "visit.json"
    support, other_triton = ROOT / "tests" / "support", os.getenv("FASTLORA_COMPILE_TRITON", "")
    path = os.pathsep.join(filter(None, (str(support), other_triton)))
    why_not = "import cuda_standin; print(cuda_standin.why_not())"
    if reason := run_python("-c", why_not, PYTHONPATH=path, TRITON_INTERPRET=None):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("FASTLORA_BACKEND", "triton")  # a GPU's default
        patch.setattr(sys, "argv", ["visit.py", "--dry", "--out", str(out)])
        visit.Visit(visit.parse(), "visit_standin").run()
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


def test_every_part_gives_a_row_and_no_failure(dry):
    rows = dry[1]["rows"]
    assert {row["table"] for row in rows} == {"calls", "compile", "gpu", "tune", "tests"}
    assert [row for row in rows if row.get("failures") or row.get("skipped")] == []


def test_a_gpu_s_own_parts_raise_nothing_on_the_standin(on_the_standin):
    assert [row for row in on_the_standin if row.get("failures") or row.get("skipped")] == []
    tables = [row["table"] for row in on_the_standin]
    assert set(tables) == {"calls", "compile", "gpu", "tune"}
    assert tables[:3] == ["calls"] * 3  # what decides most, at the start
    for row in on_the_standin:
        assert (row["launches"] > 0) == (row["table"] != "compile")


def test_compiling_ahead_is_done_for_all_layers(on_the_standin):
    [row] = [row for row in on_the_standin if row["table"] == "compile"]
    layers = sum(row["table"] == "gpu" for row in on_the_standin)
    assert row["outcome"] == f"{2 * layers} of {2 * layers} ended in time"


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
    assert outcomes["config"].endswith(" passed")


def test_products_stand_beside_torch_s_and_thin_launches_beside_a_copy(dry):
    rows = {row["id"]: row for row in dry[1]["rows"] if row["table"] == "calls"}
    in_place = {"in place", "in place, adapter last"}
    for depth in (48, 40, 64):
        row = rows[f"y m34 n48 k{depth} r16"]
        assert set(row["seconds"]) == {row["default"], "mm", "addmm", *in_place}
        tera = 2 * 34 * 48 * depth / row["seconds"]["mm"] / 1e12
        assert row["rates"]["mm"] == pytest.approx(tera, rel=1e-3)
    for call in ("h", "dA", "dB,dh", "y+"):
        row = rows[f"{call} m34 n48 r16"]
        assert set(row["seconds"]) == {row["default"], "copy"}
        tera = 2 * 34 * 48 * 2 / row["seconds"]["copy"] / 1e12
        assert row["rates"]["copy"] == pytest.approx(tera, rel=1e-3)


def test_tuning_chooses_among_what_it_tried(dry):
    rows = [row for row in dry[1]["rows"] if row["table"] == "tune"]
    assert {row["id"].split()[0] for row in rows} == {"y", "dx", "h", "dA", "dB,dh"}
    for row in rows:
        assert row["tried"] == 2
        times = {name: t for name, t in row["seconds"].items() if "Config(" in name}
        assert row["best"] == min(times, key=times.get)


def test_a_call_that_is_wrong_or_raises_has_no_time(monkeypatch):
    """And the others have."""
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


def test_plan_rows_are_printed_as_python(dry):
    printed, results = dry
    plans = [row["plan"] for row in results["rows"] if "plan" in row]
    assert {"backward=True" in text for text in plans} == {False, True}
    for text in plans:
        row = eval(text, {"Row": Row, "Plan": Plan, "GemmConfig": GemmConfig})
        assert isinstance(row, Row)
        assert repr(row) == text
        assert f"{text}," in printed.splitlines()


def test_a_visit_that_is_killed_leaves_a_whole_file(tmp_path):
    out = tmp_path / "visit.json"
    command = [*COMMAND, "--dry", "--only", "tune", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not out.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert json.loads(out.read_text(encoding="utf-8"))["rows"]


def test_what_there_is_no_time_for_is_said(tmp_path):
    out = tmp_path / "visit.json"
    command = [*COMMAND, "--dry", "--minutes", "0", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["table"] for row in rows} == {"calls", "compile", "layers", "tune", "tests"}
    assert all(row["skipped"] == {"time": "none was left"} for row in rows)


def test_tests_have_a_time_of_their_own(tmp_path, monkeypatch):
    """Whatever else took too long."""
    a_visit = visit_of(tmp_path, monkeypatch, "--minutes", "0.5")
    assert a_visit.row("tune", "h m34 n48 r16")["skipped"]
    assert "passed" in a_visit.row("tests", "config")["outcome"]
    a_visit.worker.close()


def test_a_part_that_ends_its_process_costs_only_itself(tmp_path, monkeypatch):
    a_visit = visit_of(tmp_path, monkeypatch)
    names = a_visit.worker.ask("names")["names"]
    case = next(name for kind, name in names if kind == "layers")
    ask, seconds = a_visit.worker.ask, iter([0.0, 60.0])
    monkeypatch.setattr(a_visit.worker, "ask", lambda *part, **_: ask(*part, seconds=next(seconds)))
    died, judged = a_visit.row("layers", case), a_visit.row("layers", case)
    a_visit.worker.close()
    assert died["id"] == judged["id"] == case
    assert "the process ended with -9" in died["failures"]["the process"]
    assert judged["failures"] == {}
    assert judged["rounds"] == 1


def visit_of(folder, monkeypatch, *options):
    """A dry one, that has not begun."""
    from benchmarks import visit

    out = str(folder / "visit.json")
    monkeypatch.setattr(sys, "argv", ["visit.py", "--dry", "--out", out, *options])
    return visit.Visit(visit.parse())


def test_dry_numbers_stay_out_of_the_results():
    out = ROOT / "benchmarks" / "results" / "some-device.json"
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


def test_the_sanitizer_s_words_are_in_the_row(tmp_path, monkeypatch):
    """What is found fails the part; where there is no such program, the row says so."""
    from benchmarks import visit

    served, program = visit.Served("cpu"), tmp_path / "compute-sanitizer"
    monkeypatch.setattr(visit, "sanitizer_program", lambda: str(program))
    for status in (0, 9):
        program.write_text(f"#!/bin/sh\necho $*\nexit {status}\n")
        program.chmod(0o700)
        if status == 0:
            assert "--tool racecheck" in served.sanitizer("racecheck")["outcome"]
        else:
            with pytest.raises(RuntimeError, match="ended with 9: --tool racecheck"):
                served.sanitizer("racecheck")
    monkeypatch.setattr(visit, "sanitizer_program", lambda: None)
    assert served.sanitizer("memcheck")["skipped"]
