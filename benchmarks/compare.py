"""Compare this tree's fastlora with another commit's: ``pytest benchmarks --base REF``.

Each of the two has a process that imports it from its own folder.  The processes run in turn, so
that other work on the machine affects both equally; each round gives one ratio.  Both are first
compared with the formula, without dropout, because the masks of the other commit are unknown.
"""

import io
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from fastlora.common.clock import clock_for

from .cases import Case, cpu_cases, gpu_cases
from .judge import Judge
from .lineup import make_tensors, makers_for
from .measure import in_turn, row_of, step_of, threads_for
from .tree import ROOT, Worker


def check_ref(ref: str) -> None:
    """Raise UsageError with git's message, unless ``ref`` names a commit."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        raise pytest.UsageError(f"{ref!r} is no commit of {ROOT}. {found.stderr.strip()}".strip())


@dataclass
class Pair:
    """The workers of another commit, "base", and of this tree, "fastlora"."""

    ref: str
    workers: dict[str, Worker]

    def measure(self, case: Case, seconds: float = 0.0, rounds: int = 0) -> dict:
        """A row like ``measure.measure``'s; "base" is the other commit's fastlora."""
        errors, failures, summary = {}, {}, {}
        for name, worker in self.workers.items():
            try:
                errors[name] = worker.ask("prepare", case.id)["error"]
            except RuntimeError as reason:
                failures[name] = str(reason)
        if not failures:
            steps = {name: partial(each.ask, "step") for name, each in self.workers.items()}
            summary = in_turn(steps, seconds, rounds)
        row = row_of(case, summary, errors=errors, failures=failures)
        return row | {"table": "base", "base": self.ref}


@contextmanager
def pair_with(ref: str, device: str) -> Iterator[Pair]:
    """Yield the Pair; REF's packages and tests/support are in a temporary folder until the end."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(TemporaryDirectory(prefix="fastlora-base-")))
        command = ["git", "archive", ref, "fastlora", "kernels", "tests/support"]
        archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
            packed.extractall(base, filter="data")
        workers = {}
        for name, root in (("base", base), ("fastlora", ROOT)):
            workers[name] = Worker(root, "benchmarks.compare", device)
            stack.callback(workers[name].close)
        yield Pair(ref, workers)


class Served:
    """A worker's requests: it times the fastlora that it imports, one step at a time."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cases = {case.id: case for case in (*cpu_cases(), *gpu_cases())}

    def origins(self) -> dict[str, str]:
        import fastlora.kernels

        return {"fastlora": fastlora.__file__, "kernels": fastlora.kernels.__file__}

    def prepare(self, case_id: str) -> dict[str, float]:
        """Build a case and verify it.  Returns the worst error."""
        case = self.case = self.cases[case_id]
        make, tensors = makers_for(case)["fastlora"], make_tensors(case, self.device)
        error = Judge(case, tensors, known_masks=False).error("fastlora", make, not case.decodes)
        contestant = make(case, tensors, case.dropout)
        self.timed = step_of(case, contestant, tensors, clock_for(self.device))
        return {"error": error}

    def step(self) -> dict[str, float]:
        with threads_for(self.case):
            return self.timed()
