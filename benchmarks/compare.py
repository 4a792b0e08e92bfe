"""This tree's fastlora beside another commit's: ``pytest benchmarks --base REF``.

Each of the two has a process that imports it from its own folder.  The processes run in turn, so
that whatever disturbs the machine disturbs both alike; one ratio a round is reported.  Both are
judged before, without dropout: the masks of another commit are not known here.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from .cases import Case, cpu_cases, gpu_cases
from .clock import clock_for
from .contestants import make_tensors, makers_for
from .judge import Judge
from .measure import Rounds, row_of, step_of, threads_for
from .tree import ROOT, Worker


class UnknownRefError(pytest.UsageError):
    """The repository has no such commit."""


def check_ref(ref: str) -> None:
    """Raise UnknownRefError with what git says, unless ``ref`` names a commit."""
    found = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if found.returncode != 0:
        raise UnknownRefError(f"{ref!r} is no commit of {ROOT}. {found.stderr.strip()}".strip())


@dataclass
class Pair:
    """The workers of another commit, "base", and of this tree, "fastlora"."""

    ref: str
    workers: dict[str, Worker]

    def measure(self, case: Case, run: Callable[[Rounds], None]) -> dict:
        """A row, as of ``measure.measure``, in which "base" is the other commit's fastlora."""
        errors, failures, summary = {}, {}, {}
        for name, worker in self.workers.items():
            try:
                errors[name] = worker.ask("prepare", case.id)["error"]
            except RuntimeError as reason:
                failures[name] = str(reason)
        if not failures:
            steps = {name: partial(each.ask, "step") for name, each in self.workers.items()}
            rounds = Rounds(steps)
            run(rounds)
            summary = rounds.summary()
        row = row_of(case, summary, errors=errors, failures=failures)
        return row | {"table": "base", "base": self.ref}


@contextmanager
def pair_with(ref: str, device: str) -> Iterator[Pair]:
    """REF is checked out beside this tree for a while; afterwards nothing of it is left."""
    with ExitStack() as stack:
        stack.callback(_git, "worktree", "prune")
        folder = stack.enter_context(TemporaryDirectory(prefix="fastlora-base-"))
        base = Path(folder) / "tree"
        added = _git("worktree", "add", "--detach", str(base), ref)
        if added.returncode != 0:
            raise RuntimeError(added.stderr)
        workers = {}
        for name, root in (("base", base), ("fastlora", ROOT)):
            workers[name] = Worker(root, "benchmarks.compare", device)
            stack.callback(workers[name].close)
        yield Pair(ref, workers)


class Served:
    """What a worker does: it times the fastlora that it imports, one step at a time."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cases = {case.id: case for case in (*cpu_cases(), *gpu_cases())}

    def origins(self) -> dict[str, str]:
        import fastlora.kernels

        return {"fastlora": fastlora.__file__, "kernels": fastlora.kernels.__file__}

    def prepare(self, case_id: str) -> dict[str, float]:
        """Build a case and judge it; the worst error."""
        case = self.case = self.cases[case_id]
        make, tensors = makers_for(case)["fastlora"], make_tensors(case, self.device)
        error = Judge(case, tensors, known_masks=False).error("fastlora", make, not case.decodes)
        contestant = make(case, tensors, case.dropout)
        self.timed = step_of(case, contestant, tensors, clock_for(self.device))
        return {"error": error}

    def step(self) -> dict[str, float]:
        with threads_for(self.case):
            return self.timed()


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
