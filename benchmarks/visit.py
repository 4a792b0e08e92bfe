"""Everything that a visit to a machine with a GPU should do, in ten minutes, a short table last.

    python benchmarks/visit.py --out FOLDER                 tests, benchmark, tuning
    python benchmarks/visit.py --out FOLDER --only tune     one of the three
    python benchmarks/visit.py --out FOLDER --dry           tiny, on a CPU, interpreted

It needs a folder with the repository, torch and Triton; nothing has to be installed.  The work is
done in another process, so that a crash costs one part alone and the next part has a new process.
FOLDER/<device>/<date>.json is rewritten after every part, and whole at any moment.  A number from
``--dry`` says only that the code runs.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":  # else whoever imports it has seen to that
    from tree import import_from

    import_from()

import torch

from benchmarks.cases import dry_cases, gpu_cases
from benchmarks.measure import Rounds, measure
from benchmarks.report import text
from benchmarks.results import FOLDER, describe_machine, results_path, write_results
from benchmarks.tree import ROOT, Worker
from benchmarks.tune import forms_of, tune

LIMITS = {"tests": 90.0, "layers": 60.0, "tune": 60.0}  # seconds of a part
_TESTS = ("kernel_mask", "weight_grad", "project", "lora_linear", "gemm_lowrank", "triton_backend")


def parts(device: torch.device) -> dict[tuple[str, str], object]:
    """What there is to do, by kind and name, in the order of importance, for time may run out."""
    dry = device.type == "cpu"
    cases = dry_cases() if dry else gpu_cases()
    layers = [(("layers", case.id), case) for case in cases]
    forms = [form for case in cases[: len(cases) // 3] for form in forms_of(case, device)]
    tuned = [(("tune", form.id), form) for form in dict.fromkeys(forms)]
    tests = [(("tests", name), name) for name in ("gpu", *(("config",) if dry else _TESTS))]
    return dict([tests[0], *layers[:5], *tuned[:10], *layers[5:], *tuned[10:], *tests[1:]])


class Visit:
    """The rows so far, in a file, and the process that makes the next ones."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device("cpu" if options.dry else "cuda")
        self.machine = describe_machine(self.device) | ({"device": "dry"} if options.dry else {})
        self.path = results_path(self.machine, options.out)
        self.end = time.monotonic() + 60 * options.minutes
        self.rows: list[dict] = []
        where = (ROOT, "benchmarks.visit", str(self.device))
        self.worker = Worker(*where, environment(options.dry))

    def run(self, kind: str, name: str) -> None:
        """A row of this part, or one that says why not."""
        row = {"table": kind, "id": name}
        seconds = min(LIMITS[kind], self.end - time.monotonic())
        if seconds < 5.0:
            row["skipped"] = {"time": "none was left"}
        else:
            try:
                row = self.worker.ask(kind, name, seconds=seconds)
            except RuntimeError as reason:
                row["failures"] = {"the process": str(reason)}
            if kind == "tests":
                self.worker.close()  # its settings are theirs
        self.rows.append(row)
        write_results(self.path, self.machine, sys.argv[1:], self.rows)


def main() -> None:
    options = parse()
    visit = Visit(options)
    try:
        for kind, name in parts(visit.device):
            if options.only in (None, kind):
                visit.run(kind, name)
    finally:
        visit.worker.close()
    plans = [f"{row['plan']}," for row in visit.rows if "plan" in row]
    print(f"{visit.path}\n", *plans, f"\n{text(visit.rows)}", sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, interpreted")
    parser.add_argument("--only", choices=LIMITS, help="parts of this kind alone")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
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


class Served:
    """What the worker does: a row for each part."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.parts, self.dry = parts(self.device), device == "cpu"
        count = max(2, min(14, (os.cpu_count() or 4) - 2))
        self.pool = None if self.dry else ProcessPoolExecutor(count, get_context("spawn"))

    def layers(self, name: str) -> dict:
        def run(rounds: Rounds) -> None:
            for _ in range(1 if self.dry else rounds.count(seconds=3.0)):
                rounds.run_others()
                rounds.run_subject()

        return measure(self.parts["layers", name], self.device, run)

    def tune(self, name: str) -> dict:
        return tune(self.parts["tune", name], self.device, self.pool)

    def tests(self, name: str) -> dict:
        """The outcome of tests/**/test_NAME.py; what fails is told by the log."""
        row = {"table": "tests", "id": name, "outcome": "not run"}
        import pytest

        class Summary:
            def pytest_terminal_summary(self, terminalreporter) -> None:
                stats = terminalreporter.stats.items()
                row["outcome"] = ", ".join(f"{len(found)} {kind}" for kind, found in stats if kind)

        files = map(str, sorted((ROOT / "tests").rglob(f"test_{name}.py")))
        status = pytest.main([*files, "-q", "-p", "no:cacheprovider"], plugins=[Summary()])
        if status != 0:
            raise RuntimeError(f"pytest ended with {status}: {row['outcome']}")
        return row


if __name__ == "__main__":
    main()
