"""benchmarks/visit.py must work at the first try when a GPU is available for a short time."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

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
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text()), (folder / "visit.tuning.json").read_text()


@pytest.fixture(scope="module")
def on_the_standin(tmp_path_factory) -> list[dict]:
    """The rows of the parts for GPUs, without the tests; everything above the driver is real."""
    from benchmarks import visit

    out = tmp_path_factory.mktemp("visit") / "visit.json"
    support, other_triton = ROOT / "tests" / "support", os.getenv("FASTLORA_COMPILE_TRITON", "")
    path = os.pathsep.join(filter(None, (str(support), other_triton)))
    why_not = "import cuda_standin; print(cuda_standin.why_not())"
    if reason := run_python("-c", why_not, PYTHONPATH=path, TRITON_INTERPRET=None):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("FASTLORA_BACKEND", "triton")  # the default on a GPU
        patch.setattr(sys, "argv", ["visit.py", "--dry", "--out", str(out)])
        visit.Visit(visit.parse(), "visit_standin").run()
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


def test_every_part_gives_a_row_and_no_failure(dry):
    rows = dry[1]["rows"]
    assert {row["table"] for row in rows} == {"calls", "compile", "gpu", "tune", "tests"}
    assert [row for row in rows if row.get("failures") or row.get("skipped")] == []
    outcomes = {row["id"]: row["outcome"] for row in rows if row["table"] == "tests"}
    assert " passed" in outcomes["script"]


def test_a_gpu_s_own_parts_raise_nothing_on_the_standin(on_the_standin):
    """Also, the layers' launches are compiled ahead."""
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


def test_a_part_that_ends_its_process_or_has_no_time_costs_only_itself(tmp_path, monkeypatch):
    """The tests have their own minute even if another part took too long; no file is cut off."""
    from benchmarks import visit

    out = tmp_path / "visit.json"
    monkeypatch.setattr(sys, "argv", ["visit.py", "--dry", "--out", str(out)])
    a_visit = visit.Visit(visit.parse())
    parts = a_visit.worker.ask("names")["names"]
    assert [kind for kind, _ in parts][-1] == "tests"
    call = next(name for kind, name in parts if kind == "calls")
    ask, seconds = a_visit.worker.ask, iter([0.0, 240.0])
    with monkeypatch.context() as patch:
        patch.setattr(a_visit.worker, "ask", lambda *part, **_: ask(*part, seconds=next(seconds)))
        died, judged = a_visit.row("calls", call), a_visit.row("calls", call)
    assert died["id"] == judged["id"] == call
    assert "the process ended with -9" in died["failures"]["the process"]
    assert judged["failures"] == {}
    a_visit.end = time.monotonic() + 63
    assert a_visit.row("tune", "h m34 n48 r16")["skipped"] == {"time": "no time was left"}
    with monkeypatch.context() as patch:
        patch.setattr(a_visit.worker, "ask", lambda *part, seconds: {"asked": part})
        assert a_visit.row("tests", "script") == {"asked": ("part", "tests", "script")}

    a_visit.end = 0.0
    write, files = visit.write_results, []

    def noted(path, *rest):
        write(path, *rest)
        files.append(len(json.loads(out.read_text(encoding="utf-8"))["rows"]))

    monkeypatch.setattr(visit, "write_results", noted)
    a_visit.run()
    assert files == [*range(1, len(parts) + 1)]
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["table"] for row in rows} == {"calls", "compile", "layers", "tune", "tests"}
    assert all(row["skipped"] == {"time": "no time was left"} for row in rows)


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


def test_the_sanitizer_s_words_are_in_the_row(tmp_path, monkeypatch):
    """A finding fails the part; if the program is missing, the row says so."""
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


def test_a_rented_gpu_is_sent_the_tree_and_gives_the_file(tmp_path, monkeypatch):
    """With a stand-in for Modal that runs the function locally."""
    modal, there = MagicMock(), tmp_path / "there.json"
    image = modal.Image.debian_slim.return_value.uv_pip_install.return_value
    image.add_local_dir.return_value = image.add_local_file.return_value = image
    modal.App.return_value.function.return_value = lambda function: function
    modal.App.return_value.local_entrypoint.return_value = lambda function: function
    monkeypatch.setitem(sys.modules, "modal", modal)
    scope = runpy.run_path(str(ROOT / "benchmarks" / "modal_visit.py"))
    sent = [Path(call.args[0]) for call in image.add_local_dir.call_args_list]
    assert {each.name for each in sent if each.is_dir()} >= {"fastlora", "kernels", "benchmarks"}
    run = lambda command, **_: Path(command[3]).write_bytes(b"{}")  # noqa: E731
    monkeypatch.setattr("subprocess.run", run)
    scope["main"].__globals__["visit"] = MagicMock(remote=scope["visit"])
    scope["main"](str(there))
    assert there.read_bytes() == b"{}"
    Path("/tmp/visit.json").unlink()
