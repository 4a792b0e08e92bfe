"""Everything that a visit to a machine with a GPU should do, in ten minutes, a short table last.

    python benchmarks/visit.py --out FOLDER                         tests, benchmark, tuning
    python benchmarks/visit.py --out FOLDER --only tune --case 8192x4096x4096
    python benchmarks/visit.py --out FOLDER --dry                tiny, on a CPU, interpreted

It needs a folder with the repository, torch and Triton; nothing has to be installed.  Every item
has a process of its own, so that a crash costs that item alone; it is tried again without the
contestant that it ended with.  FOLDER/<device>/<date>.json is rewritten after every row, and whole
at any moment.  A number from ``--dry`` says only that the code runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # else whoever imports it has seen to that
    sys.path.insert(0, str(Path(__file__).parent))
    from tree import import_from

    import_from()

import torch

from benchmarks.cases import dry_cases, gpu_cases
from benchmarks.contestants import makers_for
from benchmarks.measure import Rounds, measure
from benchmarks.report import text
from benchmarks.results import FOLDER, describe_machine, results_path, write_results
from benchmarks.tree import BENCHMARKS, ROOT, own_stdout
from benchmarks.tune import DRY, Search, compilers, forms_of, tune

LIMITS = {"tests": 90.0, "layers": 60.0, "tune": 150.0}  # seconds of an item
_TRIES = 4
_NOBODY = ("start", "rounds", "finals")  # who ends a process then can't be left out
_TESTS = ("kernel_mask", "weight_grad", "project", "lora_linear", "gemm_lowrank", "triton_backend")


class Visit:
    """The rows so far, in a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dry, self.rows = options.dry, []
        self.machine = describe_machine(torch.device("cpu" if options.dry else "cuda"))
        if options.dry:
            self.machine["device"] = "dry"
        self.path = results_path(self.machine, options.out)
        self.end = time.monotonic() + 60 * options.minutes

    def add(self, row: dict) -> None:
        self.rows.append(row)
        write_results(self.path, self.machine, sys.argv[1:], self.rows)

    def run(self, kind: str, name: str) -> None:
        """One item, or a row that says why not."""
        without: list[str] = []
        for _ in range(_TRIES):
            seconds = min(LIMITS[kind], self.end - time.monotonic())
            if seconds < 5.0:
                self.add({"table": kind, "id": name, "skipped": {"time": "none was left"}})
                return
            done = [row["id"] for row in self.rows if row["table"] == kind]
            item = {"kind": kind, "name": name, "dry": self.dry, "without": without, "done": done}
            code, trying, log = self._start(item, seconds)
            if code == 0:
                return
            why = f"the process ended with {code}, after {seconds:.0f} s at most: {log[-1500:]}"
            self.add({"table": kind, "id": name, "failures": {trying: why}})
            if trying in _NOBODY:
                return
            without.append(trying)

    def _start(self, item: dict, seconds: float) -> tuple[int, str, str]:
        """Exit status, who was tried last, and what was printed; rows are added as they come."""
        trying = "start"
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = subprocess.Popen(
                [sys.executable, str(BENCHMARKS / "visit.py"), "--item", json.dumps(item)],
                cwd=ROOT, env=environment(self.dry), text=True, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            timer = threading.Timer(seconds, _kill, [process])
            timer.start()
            try:
                for line in process.stdout:
                    message = json.loads(line)
                    trying = message.get("trying", trying)
                    if "row" in message:
                        self.add(message["row"])
                code = process.wait()
            finally:
                timer.cancel()
                _kill(process)
            log.seek(0)
            return code, trying, log.read()


def main() -> None:
    options = parse()
    visit = Visit(options)
    for kind, name in items(options):
        visit.run(kind, name)
    print(f"{visit.path}\n")
    for row in visit.rows:
        if "plan" in row:
            print(f"{row['plan']},")
    print(f"\n{text(visit.rows)}")


def items(options: argparse.Namespace) -> list[tuple[str, str]]:
    """In the order of importance, for time may run out."""
    cases = dry_cases() if options.dry else gpu_cases()
    layers = [("layers", case.id) for case in cases]
    tuned = [("tune", case.id) for case in cases if case.r == 16 or options.dry][: len(cases) // 3]
    tests = [("tests", name) for name in (("config",) if options.dry else _TESTS)]
    listed = [("tests", "gpu"), *layers[:5], *tuned[:2], *layers[5:], *tuned[2:], *tests]
    return [
        (kind, name)
        for kind, name in listed
        if options.only in (None, kind) and (kind == "tests" or options.case in name)
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, interpreted")
    parser.add_argument("--only", choices=LIMITS, help="items of this kind alone")
    parser.add_argument("--case", default="", metavar="PART", help="cases with this in their id")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all items together")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.dry and options.out.is_relative_to(FOLDER):
        parser.error("--dry measures nothing: its numbers don't belong in benchmarks/results")
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --dry runs without one")
    return options


def environment(dry: bool) -> dict[str, str]:
    """Triton reads TRITON_INTERPRET when the kernels are imported."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if dry:  # one thread: on a busy machine tiny products wait for the others' threads
        kept |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return kept


def run_item(item: dict) -> None:
    """In the item's own process: a line of JSON for each row, and for who is tried next."""
    with own_stdout() as out:

        def send(**message: object) -> None:
            out.write(f"{json.dumps(message)}\n")
            out.flush()

        def watch(name: str) -> None:
            send(trying=name)

        device = torch.device("cpu" if item["dry"] else "cuda")
        if item["kind"] == "tests":
            send(row=run_tests(item["name"]))
            return
        case = next(each for each in (*dry_cases(), *gpu_cases()) if each.id == item["name"])
        if item["kind"] == "layers":

            def run(rounds: Rounds) -> None:
                for _ in range(1 if item["dry"] else rounds.count(seconds=3.0)):
                    rounds.run_others()
                    rounds.run_subject()

            makers = {k: v for k, v in makers_for(case).items() if k not in item["without"]}
            send(row=measure(case, device, run, makers, watch))
            return
        search, pool = (DRY, None) if item["dry"] else (Search(), compilers())
        for form in forms_of(case, device):
            if form.id not in item["done"]:
                send(row=tune(form, device, search, pool, watch, item["without"]))


def run_tests(noun: str) -> dict:
    """The outcome of tests/**/test_NOUN.py."""
    row = {"table": "tests", "id": noun, "outcome": "not run"}
    if find_spec("pytest") is None:
        return row | {"skipped": {"pytest": "pytest is not installed"}}
    import pytest

    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, {}

    class Reports:
        def pytest_runtest_logreport(self, report) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
            if report.failed:
                failures[report.nodeid] = report.longreprtext[-1500:]

    files = map(str, sorted((ROOT / "tests").rglob(f"test_{noun}.py")))
    status = pytest.main([*files, "-q", "-p", "no:cacheprovider"], plugins=[Reports()])
    outcome = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    return row | {"outcome": outcome or f"pytest ended with {status}", "failures": failures}


def _kill(process: subprocess.Popen) -> None:
    """The item and the compilers that it may have left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--item"]:
        run_item(json.loads(sys.argv[2]))
    else:
        main()
