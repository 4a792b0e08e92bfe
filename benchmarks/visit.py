"""Everything that a visit to a machine with a GPU should do, in ten minutes, a short table last.

    python benchmarks/visit.py --out FILE.json                  all of it
    python benchmarks/visit.py --out FILE.json --dry            tiny, on a CPU, interpreted

It needs a folder with the repository, torch and Triton; nothing has to be installed.  The work is
done in another process: a crash costs one part alone, and the next has a new process.  FILE is
whole after every part.  A number from ``--dry`` says only that the code runs.
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

if __name__ == "__main__":  # else whoever imports it has seen to that
    from tree import import_from

    import_from()

import torch

from benchmarks.calls import ahead, reached
from benchmarks.cases import Case, dry_cases, gpu_cases
from benchmarks.forms import Form
from benchmarks.lineup import make_tensors, makers_for
from benchmarks.measure import measure
from benchmarks.report import text
from benchmarks.results import FOLDER, describe_machine, write_results
from benchmarks.tree import ROOT, Worker
from fastlora.backends.triton import measured
from fastlora.kernels import target_of
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.target import Target, use_target

LIMITS = {  # seconds of a part
    "calls": 30, "compile": 60, "layers": 45, "tune": 45, "sanitizer": 60, "tests": 75,
}  # fmt: skip
_KEPT_FOR_TESTS = 60.0
_PYTEST = (sys.executable, "-c", """
import sys
sys.path.insert(0, "benchmarks")
from tree import import_from
import_from()
import pytest
sys.exit(pytest.main(sys.argv[1:]))
""", "-q", "-p", "no:cacheprovider")  # fmt: skip


class Visit:
    """The rows so far, in a file, and the process that makes the next ones."""

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
        """What a part gave, or why it gave nothing."""
        left = self.end - time.monotonic() - _KEPT_FOR_TESTS * (kind != "tests")
        if left < 5.0:
            return {"table": kind, "id": name, "skipped": {"time": "none was left"}}
        try:
            limit = LIMITS[kind] * (3 if self.options.dry else 1)  # a CPU may have other work
            return self.worker.ask("part", kind, name, seconds=min(limit, left))
        except RuntimeError as reason:
            return {"table": kind, "id": name, "failures": {"the process": str(reason)}}


def main() -> None:
    visit = Visit(parse())
    visit.run()
    out = visit.options.out
    rows = [measured.as_row(row["plan"]) for row in visit.rows if "plan" in row]
    if rows:  # as fastlora.tune writes them
        out.with_suffix(".tuning.json").write_text(measured.as_text(rows[0].device, rows))
    print(f"{out}\n\n{text(visit.rows)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, interpreted")
    parser.add_argument("--only", choices=LIMITS, help="parts of this kind alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.dry and options.out.is_relative_to(FOLDER):
        parser.error("--dry measures nothing: its numbers don't belong in benchmarks/results")
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --dry runs without one")
    return options


def environment(dry: bool) -> dict[str, str]:
    """Triton reads TRITON_INTERPRET when the kernels are imported.

    The visit judges results by itself: a wrong kernel is to be seen, and not replaced.  Plans are
    those of everybody, whatever was tuned here.
    """
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept |= {"FASTLORA_VERIFY": "off", "FASTLORA_CACHE": os.devnull}
    if dry:  # one thread: on a busy machine tiny products wait for the others' threads
        kept |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return kept


class Served:
    """What the worker does: a row for each part."""

    def __init__(self, device: str) -> None:
        self.device, self.dry = torch.device(device), device == "cpu"
        self.parts = self.listed()

    def names(self) -> dict:
        return {"names": list(self.parts)}

    def part(self, kind: str, name: str) -> dict:
        return getattr(self, kind)(self.parts[kind, name])

    def listed(self) -> dict[tuple[str, str], object]:
        """What there is to do, by kind and name: the most decisive first, and tests last."""
        cases, M = (dry_cases(), 34) if self.dry else (gpu_cases(), 8192)
        widths = (48, 40, 64) if self.dry else (4096, 1024, 14336)
        ys, dxs = ([Form(name, M, widths[0], (16,), (k,)) for k in widths] for name in ("y", "dx"))
        thin = [Form(name, M, widths[0], (16,)) for name in ("h", "dA", "dB,dh", "y+")]
        masked = [Form(name, M, widths[0], (16,), dropout=0.1) for name in ("h", "dA", "dx+")]
        found: dict[tuple[str, str], object] = {("calls", form.id): form for form in ys + thin}
        found |= {("compile", "layers"): cases} | {("layers", case.id): case for case in cases}
        found |= {("calls", form.id): form for form in masked}
        found |= {("tune", form.id): form for form in (*ys[:2], *dxs[:2], *thin[:3])}
        names = "script" if self.dry else "gpu, kernel_mask"
        tools = () if self.dry else ("memcheck", "racecheck")
        found |= {("sanitizer", tool): tool for tool in tools}
        return found | {("tests", names): names}

    @cached_property
    def pool(self) -> Executor | None:
        """For compilers; the interpreter has none."""
        count = max(2, min(14, (os.cpu_count() or 4) - 2))
        return None if self.dry else ProcessPoolExecutor(count, get_context("spawn"))

    def calls(self, form: Form) -> dict:
        return reached(form, self.device)

    def compile(self, cases: list[Case]) -> dict:
        """What the layers will launch, into Triton's cache on disk."""
        target = target_of(self.device)
        asked = [(case, name, target) for case in cases for name in ("fused", "in place")]
        ended = ahead(self.pool, 45.0, compile_layer, asked)
        row = {"id": "layers", "outcome": f"{len(ended)} of {len(asked)} ended in time"}
        failures = {f"{case.id}, {name}": why for (case, name, _), why in ended.items() if why}
        return row | {"table": "compile", "failures": failures}

    def layers(self, case: Case) -> dict:
        return measure(case, self.device, seconds=3.0, rounds=int(self.dry))

    def tune(self, form: Form) -> dict:
        return reached(form, self.device, 2 if self.dry else 400, self.pool) | {"table": "tune"}

    def sanitizer(self, tool: str) -> dict:
        """Steps of a layer and of experts under compute-sanitizer, where it is installed."""
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
    """What a command says at its end; a RuntimeError with more of it if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"it ended with {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def sanitizer_program() -> str | None:
    """compute-sanitizer of the CUDA toolkit, or of the package nvidia-cuda-sanitizer-api."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = shutil.which("compute-sanitizer") or next(packages.rglob("compute-sanitizer"), None)
    return None if found is None else str(found)


def compile_layer(case: Case, name: str, target: Target) -> None:
    """What a step of a contestant would launch; its tensors are meta tensors."""
    tensors = make_tensors(case, torch.device("meta"))
    contestant = makers_for(case)[name](case, tensors, case.dropout)
    with use_target(target), intercept(Launch.compile), contestant.chosen():
        with torch.set_grad_enabled(not case.decodes):
            ys = contestant.module(tensors.x)
        if not case.decodes:
            torch.autograd.backward(ys, tensors.dys)


if __name__ == "__main__":
    main()
