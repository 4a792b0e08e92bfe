"""A visit: all measurements on a machine with a GPU, in ten minutes, with a short table at the end.

    python benchmarks/visit.py --out FILE.json                  all of it
    python benchmarks/visit.py --out FILE.json --dry            tiny, on a CPU, interpreted

It needs a folder with the repository, torch and Triton; nothing has to be installed.  Another
process does the work, so a crash loses only one part, and the next part gets a new process.  FILE
is complete after every part.  Numbers of ``--dry`` only show that the code runs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":  # an importing module has already done this
    from tree import import_from

    import_from()

import torch

from benchmarks.calls import compile_ahead, loss_reached, reached
from benchmarks.cases import Case, dry_cases, gpu_cases
from benchmarks.forms import Form
from benchmarks.lineup import make_tensors, makers_for
from benchmarks.measure import measure
from benchmarks.report import text
from benchmarks.results import FOLDER, describe_machine, write_results
from benchmarks.tree import ROOT, Worker
from fastlora.backends.triton import measured
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.target import Target, target_of, use_target

LIMITS = {  # seconds for a part
    "calls": 30, "compile": 60, "layers": 45, "tune": 45, "sanitizer": 60, "tests": 75,
}  # fmt: skip
_KEPT_FOR_TESTS = 60.0
_DRY_LIMIT = 3600.0  # seconds for a dry part: it measures nothing, and the machine may be busy
_PYTEST = (sys.executable, "-c", """
import sys
sys.path.insert(0, "benchmarks")
from tree import import_from
import_from()
import pytest
sys.exit(pytest.main(sys.argv[1:]))
""", "-q", "-p", "no:cacheprovider")  # fmt: skip


class Visit:
    """The rows so far, in a file, and the process that measures the next rows."""

    def __init__(self, options: argparse.Namespace, module: str = "benchmarks.visit") -> None:
        self.options, self.end = options, time.monotonic() + 60 * options.minutes
        device = torch.device("cpu" if options.dry else "cuda")
        self.machine = describe_machine(device) | ({"device": "dry"} if options.dry else {})
        self.rows: list[dict] = []
        self.worker = Worker(ROOT, module, str(device), environment(options.dry))

    def run(self) -> None:
        try:
            for kind, name in self.worker.ask("names")["names"]:
                if self.options.only in (None, kind):
                    self.rows.append(self.row(kind, name))
                    write_results(self.options.out, self.machine, sys.argv[1:], self.rows)
        finally:
            self.worker.close()

    def row(self, kind: str, name: str) -> dict:
        """The row of a part, or the reason why it has none."""
        left = self.end - time.monotonic() - _KEPT_FOR_TESTS * (kind != "tests")
        limit = _DRY_LIMIT if self.options.dry else min(LIMITS[kind], left)
        if limit < 5.0:
            return {"table": kind, "id": name, "skipped": {"time": "no time was left"}}
        try:
            return self.worker.ask("part", kind, name, seconds=limit)
        except RuntimeError as reason:
            return {"table": kind, "id": name, "failures": {"the process": str(reason)}}


def main() -> None:
    visit = Visit(parse())
    visit.run()
    out = visit.options.out
    rows = [measured.as_row(row["plan"]) for row in visit.rows if "plan" in row]
    if rows:  # in the format of fastlora.tune
        out.with_suffix(".tuning.json").write_text(measured.as_text(rows[0].device, rows))
    print(f"{out}\n\n{text(visit.rows)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, interpreted")
    parser.add_argument("--only", choices=LIMITS, help="run only parts of this kind")
    parser.add_argument("--minutes", type=float, default=9.0, help="minutes for all parts together")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.dry and options.out.is_relative_to(FOLDER):
        parser.error("--dry measures nothing: its numbers don't belong in benchmarks/results")
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --dry runs without one")
    return options


def environment(dry: bool) -> dict[str, str]:
    """The worker's environment.  Triton reads TRITON_INTERPRET at import.

    The visit verifies results itself: a wrong kernel must be seen, not replaced.  It uses the
    default plans, even if other plans were tuned on this machine.
    """
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept |= {"FASTLORA_VERIFY": "off", "FASTLORA_CACHE": os.devnull}
    if dry:  # one thread, because on a busy machine tiny products wait for other threads
        kept |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return kept


class Served:
    """Answers the worker's requests.  Each part gives a row."""

    def __init__(self, device: str) -> None:
        self.device, self.dry = torch.device(device), device == "cpu"
        self.parts = self.listed()

    def names(self) -> dict:
        return {"names": list(self.parts)}

    def part(self, kind: str, name: str) -> dict:
        return getattr(self, kind)(self.parts[kind, name])

    def listed(self) -> dict[tuple[str, str], object]:
        """All parts by kind and name: the most decisive first, tests last."""
        cases, M = (dry_cases(), 34) if self.dry else (gpu_cases(), 8192)
        widths = (48, 40, 64) if self.dry else (4096, 1024, 14336)
        ys, dxs = ([Form(name, M, widths[0], (16,), (k,)) for k in widths] for name in ("y", "dx"))
        thin = [Form(name, M, widths[0], (16,)) for name in ("h", "dA", "dB,dh", "y+")]
        masked = [Form(name, M, widths[0], (16,), dropout=0.1) for name in ("h", "dA", "dx+")]
        loss = Form("loss", 34 if self.dry else 2048, 48 if self.dry else 128256, ())
        found: dict[tuple[str, str], object] = {("calls", f.id): f for f in (*ys, *thin, loss)}
        found |= {("compile", "layers"): cases} | {("layers", case.id): case for case in cases}
        found |= {("calls", form.id): form for form in masked}
        found |= {("tune", form.id): form for form in (*ys[:2], *dxs[:2], *thin[:3])}
        names = "capture" if self.dry else "gpu, kernel_mask"
        tools = () if self.dry else ("memcheck", "racecheck")
        found |= {("sanitizer", tool): tool for tool in tools}
        return found | {("tests", names): names}

    @cached_property
    def pool(self) -> Executor | None:
        """Processes for compiling; the interpreter needs none."""
        count = max(2, min(14, (os.cpu_count() or 4) - 2))
        return None if self.dry else ProcessPoolExecutor(count, get_context("spawn"))

    def calls(self, form: Form) -> dict:
        run = loss_reached if form.name == "loss" else reached
        return run(form, self.device)

    def compile(self, cases: list[Case]) -> dict:
        """Compile the launches of the layers into Triton's cache on disk."""
        target = target_of(self.device)
        asked = [(case, name, target) for case in cases for name in ("fused", "in place")]
        limit = _DRY_LIMIT if self.dry else 45.0
        ended = compile_ahead(self.pool, limit, compile_layer, asked)
        row = {"id": "layers", "outcome": f"{len(ended)} of {len(asked)} ended in time"}
        failures = {f"{case.id}, {name}": why for (case, name, _), why in ended.items() if why}
        return row | {"table": "compile", "failures": failures}

    def layers(self, case: Case) -> dict:
        return measure(case, self.device, seconds=3.0, rounds=int(self.dry))

    def tune(self, form: Form) -> dict:
        return reached(form, self.device, 2 if self.dry else 400, self.pool) | {"table": "tune"}

    def sanitizer(self, tool: str) -> dict:
        """Steps of a layer and of experts under compute-sanitizer, if it is installed."""
        if (program := sanitizer_program()) is None:
            skipped = {"compute-sanitizer": "it isn't installed"}
            return {"table": "sanitizer", "id": tool, "skipped": skipped}
        command = [program, "--tool", tool, "--error-exitcode", "9", *_PYTEST, "-k", "sanitizer"]
        outcome = last_line([*command, "tests/kernels/test_gpu.py"])
        return {"table": "sanitizer", "id": tool, "outcome": outcome}

    def tests(self, names: str) -> dict:
        """The outcomes of tests/**/test_NAME.py."""
        files = [str(*(ROOT / "tests").rglob(f"test_{name}.py")) for name in names.split(", ")]
        return {"table": "tests", "id": names, "outcome": last_line([*_PYTEST, *files])}


def last_line(command: Sequence[str]) -> str:
    """The last line of a command's output; a RuntimeError with more of it if the command fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the command ended with {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def sanitizer_program() -> str | None:
    """compute-sanitizer of the CUDA toolkit, or of the package nvidia-cuda-sanitizer-api."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = shutil.which("compute-sanitizer") or next(packages.rglob("compute-sanitizer"), None)
    return None if found is None else str(found)


def compile_layer(case: Case, name: str, target: Target) -> None:
    """Compile the launches of a contestant's step; its tensors are meta tensors."""
    tensors = make_tensors(case, torch.device("meta"))
    contestant = makers_for(case)[name](case, tensors, case.dropout)
    with use_target(target), intercept(Launch.compile), contestant.chosen():
        with torch.set_grad_enabled(not case.decodes):
            ys = contestant.module(tensors.x)
        if not case.decodes:
            torch.autograd.backward(ys, tensors.dys)


if __name__ == "__main__":
    main()
