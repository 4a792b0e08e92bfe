"""benchmarks/gpu_visit.py, which must work at the first try when a GPU is at hand."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastlora.kernels.config import GemmConfig, ProjectConfig, WeightGradConfig
from fastlora.kernels.plan import Plan, Row

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_visit.py"
_SPEC = spec_from_file_location("gpu_visit", SCRIPT)
gpu_visit = module_from_spec(_SPEC)
_SPEC.loader.exec_module(gpu_visit)  # from here on `benchmarks` can be imported

from benchmarks.gpu import layers, profile, table  # noqa: E402
from benchmarks.gpu.candidates import candidates  # noqa: E402
from benchmarks.gpu.cases import layer_cases, main_cases  # noqa: E402
from benchmarks.gpu.journal import LOST, Journal  # noqa: E402
from benchmarks.gpu.timing import CudaClock, HostClock, whole  # noqa: E402
from benchmarks.oracle import TOLERANCE  # noqa: E402

CONFIGS = {kind.__name__: kind for kind in (GemmConfig, ProjectConfig, WeightGradConfig)}


def visit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", SCRIPT, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    """A whole dry visit: what it printed, and its results."""
    out = tmp_path_factory.mktemp("visit")
    done = visit("--dry", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (out / "dry").glob("*.json")
    return done, json.loads(path.read_text(encoding="utf-8"))


def rows_of(results: dict, name: str) -> list[dict]:
    return [row for row in results["rows"] if row["table"] == f"gpu-{name}"]


def test_every_step_gives_rows_and_no_error(dry):
    _, results = dry
    assert results["dry"] is True
    assert set(results["steps"]) == {"facts", "tests", "layers", "launches", "tuning"}
    for name, step in results["steps"].items():
        assert step["rows"] > 0, name
        assert step["failures"] == step["skipped"] == [], name


def test_every_timed_candidate_was_judged(dry):
    _, results = dry
    for row in rows_of(results, "layers"):
        assert row["failures"] == {}
        assert {"frozen", "fused", "in place"} <= set(row["judged"])
        for seconds in row["seconds"].values():
            assert set(seconds) == set(row["judged"])
        for judged in row["judged"].values():
            assert judged["error"] <= TOLERANCE[torch.bfloat16]


def test_the_tests_step_runs_tests(dry):
    [row] = rows_of(dry[1], "tests")
    assert row["counts"] == {"passed": row["collected"]}


def test_every_launch_is_timed(dry):
    launches = [launch for row in rows_of(dry[1], "launches") for launch in row["launches"]]
    kernels = {launch["kernel"] for launch in launches}
    assert {"project", "gemm_lowrank", "weight_grad"} <= kernels
    assert all(launch["seconds"] > 0 for launch in launches)


def test_tuning_chooses_among_what_it_tried(dry):
    rows = rows_of(dry[1], "tuning")
    assert {row["kernel"] for row in rows} == {"project", "gemm_lowrank", "weight_grad"}
    for row in rows:
        assert row["tried"] == row["candidates"] == 2
        best = min((name for name in row["seconds"] if name != "in place"), key=row["seconds"].get)
        assert row["best"] == best


def test_plan_rows_are_python(dry):
    done, results = dry
    plans = [row["plan"] for row in rows_of(results, "tuning") if row["kernel"] == "gemm_lowrank"]
    assert plans
    for text in plans:
        row = eval(text, {"Row": Row, "Plan": Plan, **CONFIGS})
        assert isinstance(row, Row)
        assert repr(row) == text
        assert f"{text}," in done.stdout.splitlines()


def test_table_is_short_and_last(dry):
    done, results = dry
    expected = table.table(results)
    assert done.stdout.endswith(f"{expected}\n")
    assert len(expected) < 12_000
    crowded = {**results, "rows": 20 * results["rows"]}
    for step in crowded["steps"].values():
        step = {**step, "failures": 20 * [{"failed": "an item", "error": "its text"}]}
        crowded["steps"] = {**crowded["steps"], "layers": step}
    assert len(table.table(crowded).splitlines()) <= 40


def test_dry_numbers_stay_out_of_the_results():
    done = visit("--dry", "--out", str(ROOT / "benchmarks" / "results" / "some-device"))
    assert done.returncode == 2
    assert "don't belong in benchmarks/results" in done.stderr
    assert not (ROOT / "benchmarks" / "results" / "some-device").exists()


def test_a_wrong_candidate_has_no_time():
    case = layer_cases(dry=True)[0]
    right = [each for each in candidates("eager") if each.name in ("frozen", "addmm chain")]

    def twice_as_much(case, inputs, pairs, dropout):
        forward = right[1].make(case, inputs, pairs, dropout)
        return lambda x: tuple(2 * y for y in forward(x))

    wrong = replace(right[1], name="wrong", make=twice_as_much)
    row = layers.measure(case, HostClock(), torch.device("cpu"), [*right, wrong], layers.DRY)
    assert "from the oracle, beyond" in row["failures"]["wrong"]
    assert "wrong" not in row["judged"]
    assert all(set(times) == {"frozen", "addmm chain"} for times in row["seconds"].values())


def test_a_candidate_that_raises_costs_only_itself():
    case = layer_cases(dry=True)[0]
    right = [each for each in candidates("eager") if each.name in ("frozen", "addmm chain")]

    def raising(case, inputs, pairs, dropout):
        raise RuntimeError("out of resource: shared memory")

    listed = [right[0], replace(right[1], name="raising", make=raising), right[1]]
    row = layers.measure(case, HostClock(), torch.device("cpu"), listed, layers.DRY)
    assert "out of resource" in row["failures"]["raising"]
    assert set(row["seconds"]["both"]) == {"frozen", "addmm chain"}


def crash(journal: Journal, *parts: str | None) -> None:
    """End as suddenly as a process does: nothing more is written."""
    with suppress(KeyboardInterrupt), journal.item("case"):
        for part in parts:
            journal.doing(part)
        raise KeyboardInterrupt


class TestJournal:
    def test_a_crash_bans_the_part_and_repeats_the_item(self, tmp_path):
        journal = Journal(tmp_path / "step.jsonl")
        crash(journal, "frozen", "fused")
        assert Journal(journal.path).close_unfinished("illegal memory access")
        again = Journal(journal.path)
        assert again.wants("case")
        assert again.banned("case") == {"fused"}
        assert again.banned("another case") == set()
        assert [failure["failed"] for failure in again.failures] == ["case, fused"]

    def test_a_crash_that_is_nobodys_fault_ends_the_item(self, tmp_path):
        journal = Journal(tmp_path / "step.jsonl")
        crash(journal, "fused", None)
        assert Journal(journal.path).close_unfinished("killed")
        assert not Journal(journal.path).wants("case")

    def test_an_exception_is_recorded_and_the_next_item_runs(self, tmp_path):
        journal = Journal(tmp_path / "step.jsonl")
        with journal.item("first"):
            raise ValueError("no such tile")
        with journal.item("second"):
            journal.add({"found": 1})
        assert "no such tile" in journal.failures[0]["error"]
        assert journal.rows == [{"found": 1}]
        assert not journal.close_unfinished("")

    def test_no_item_begins_after_the_deadline(self, tmp_path):
        journal = Journal(tmp_path / "step.jsonl", deadline=0.0)
        assert not journal.wants("case")
        assert journal.skipped == ["case"]


def test_a_lost_device_costs_one_process(tmp_path, monkeypatch):
    statuses = [LOST, LOST, 0]

    def start(name, folder, deadline, dry):
        journal, status = Journal(folder / f"{name}.jsonl", deadline), statuses.pop(0)
        assert journal.wants("case")
        if status == LOST:
            crash(journal, f"candidate {len(statuses)}")
        return status, "Triton Error [CUDA]: an illegal memory access was encountered"

    monkeypatch.setattr(gpu_visit, "start", start)
    gpu_visit.run("layers", tmp_path, 60.0, dry=False)
    failures = Journal(tmp_path / "layers.jsonl").failures
    assert statuses == []
    assert [each["failed"] for each in failures] == ["case, candidate 2", "case, candidate 1"]
    assert "illegal memory access" in failures[0]["error"]


def test_a_step_that_dies_before_its_first_item_is_not_tried_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_visit, "start", lambda *call: calls.append(call) or (1, "ImportError"))
    gpu_visit.run("layers", tmp_path, 60.0, dry=False)
    assert len(calls) == 1
    [failure] = Journal(tmp_path / "layers.jsonl").failures
    assert "ImportError" in failure["error"]


class FakeCuda:
    """torch.cuda's clock: a kernel of so many cycles, and calls that take the device so long."""

    def __init__(self, monkeypatch, host_seconds: float) -> None:
        self.issued, self.device_end = 0.0, 0.0
        self.host_seconds = host_seconds
        properties = SimpleNamespace(L2_cache_size=1024)
        for name, fake in {
            "get_device_properties": lambda device: properties,
            "_sleep": lambda cycles: self.run(cycles / 1e9),
            "synchronize": self.synchronize,
            "Event": lambda enable_timing: FakeEvent(self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def run(self, seconds: float) -> None:
        self.device_end = max(self.device_end, self.issued) + seconds

    def call(self) -> None:
        """The host issues for a while, and then the device has a millisecond of work."""
        self.issued += self.host_seconds
        self.run(1e-3)

    def synchronize(self, device=None) -> None:
        self.issued = max(self.issued, self.device_end)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.at = max(self.cuda.device_end, self.cuda.issued)

    def query(self) -> bool:
        return self.at <= self.cuda.issued

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.at - self.at)


class TestCudaClock:
    def test_seconds_are_the_devices(self, monkeypatch):
        cuda = FakeCuda(monkeypatch, host_seconds=0.1e-3)
        clock = CudaClock(torch.device("cpu"))

        def step(lap):
            for _ in range(2):
                cuda.call()
                lap()

        assert clock.cycles == pytest.approx(1e9)
        assert clock.time(step, flush=True) == pytest.approx([1e-3, 2e-3])
        assert clock.late == 0

    def test_a_slow_host_gets_a_longer_start(self, monkeypatch):
        cuda = FakeCuda(monkeypatch, host_seconds=1.9e-3)
        clock = CudaClock(torch.device("cpu"))
        assert clock.time(whole(cuda.call)) == pytest.approx([1e-3])
        assert clock.ahead >= 1.9e-3

    def test_a_host_that_is_never_ahead_is_counted(self, monkeypatch):
        cuda = FakeCuda(monkeypatch, host_seconds=1.0)
        clock = CudaClock(torch.device("cpu"))
        [seconds] = clock.time(whole(cuda.call))
        assert seconds > 0.9
        assert clock.late == 1

    def test_a_graph_is_captured_once_and_gives_the_first_call_s_result(self, monkeypatch):
        FakeCuda(monkeypatch, host_seconds=0.0)
        replays, side = [], SimpleNamespace(wait_stream=lambda stream: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: side)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        graph = SimpleNamespace(replay=lambda: replays.append(1))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        monkeypatch.setattr(torch.cuda, "graph", nullcontext)
        clock = CudaClock(torch.device("cpu"))
        replay = clock.capture([lambda: "first", lambda: "second"])
        assert replays == []
        assert replay() == "first"
        assert replays == [1]


def test_the_profilers_csv_is_read():
    printed = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","gemm_lowrank_kernel","dram__bytes_read.sum","Mbyte","104.2"\n'
        '"0","gemm_lowrank_kernel","dram__bytes_write.sum","Mbyte","66.9"\n'
    )
    assert profile.parse(printed) == {
        "dram__bytes_read.sum": "104.2 Mbyte",
        "dram__bytes_write.sum": "66.9 Mbyte",
    }


def test_the_most_important_shape_comes_first():
    first = layer_cases(dry=False)[0]
    assert (first.M, first.K, first.outputs, first.r) == (8192, 4096, (4096,), 16)
    assert main_cases(dry=False)[0] == first


def test_the_interpreter_is_for_dry_visits_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in gpu_visit.environment(dry=False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert gpu_visit.environment(dry=True)["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in os.environ
