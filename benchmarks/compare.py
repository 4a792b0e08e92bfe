"""This tree's fastlora beside another commit's: ``pytest benchmarks --base REF``.

Each of the two has a process that imports it from its own folder.  The processes run in turn, so
that whatever disturbs the machine disturbs both alike; one ratio a round is reported.  Both are
judged before, without dropout: the masks of another commit are not known here.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from .cases import Case, cpu_cases, gpu_cases
from .clock import clock_for
from .contestants import make_tensors, makers_for
from .judge import Judge
from .measure import Rounds, describe, row_of, step_of, threads_for
from .tree import BENCHMARKS, ROOT, own_stdout


class UnknownRefError(ValueError):
    """The repository has no such commit."""


def check_ref(ref: str) -> None:
    """Raise UnknownRefError with what git says, unless ``ref`` names a commit."""
    found = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if found.returncode != 0:
        raise UnknownRefError(f"{ref!r} is no commit of {ROOT}. {found.stderr.strip()}".strip())


class Worker:
    """A process that times the fastlora of one folder, one step at a time."""

    def __init__(self, root: Path, device: str) -> None:
        command = [sys.executable, str(BENCHMARKS / "tree.py"), str(root)]
        self.process = subprocess.Popen(
            [*command, "benchmarks.compare", device],
            cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is this process's business
        )  # fmt: skip
        self.origins = self._answer()

    def prepare(self, case: Case) -> float:
        """Build and judge it; the worst error."""
        return self._ask(case.id)["error"]

    def step(self) -> dict[str, float]:
        return self._ask("step")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, request: str) -> dict:
        with suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write(f"{request}\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer


class Pair:
    """A context manager: the workers of this tree and of REF, checked out beside it for a while."""

    def __init__(self, ref: str, device: str) -> None:
        self.ref, self.device = ref, device

    def __enter__(self) -> "Pair":
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="fastlora-base-"))
            stack.callback(_remove, folder)
            added = _git("worktree", "add", "--detach", str(folder / "tree"), self.ref)
            if added.returncode != 0:
                raise RuntimeError(added.stderr)
            self.workers = {}
            for name, root in (("base", folder / "tree"), ("fastlora", ROOT)):
                self.workers[name] = Worker(root, self.device)
                stack.callback(self.workers[name].close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def measure(self, case: Case, run: Callable[[Rounds], None]) -> dict:
        """A row, as of ``measure.measure``, in which "base" is the other commit's fastlora."""
        errors, failures, summary = {}, {}, {}
        for name, worker in self.workers.items():
            try:
                errors[name] = worker.prepare(case)
            except RuntimeError as reason:
                failures[name] = str(reason)
        if not failures:
            rounds = Rounds({name: worker.step for name, worker in self.workers.items()})
            run(rounds)
            summary = rounds.summary()
        row = row_of(case, summary, errors=errors, failures=failures)
        return row | {"table": "base", "base": self.ref}


def main(arguments: list[str]) -> None:
    """The worker: a request a line, an answer a line."""
    import fastlora
    import fastlora.kernels

    with own_stdout() as answers:
        _send(answers, {"fastlora": fastlora.__file__, "kernels": fastlora.kernels.__file__})
        cases = {case.id: case for case in (*cpu_cases(), *gpu_cases())}
        device, step = torch.device(arguments[0]), None
        for line in sys.stdin:
            try:
                if line.strip() == "step":
                    _send(answers, step())
                else:
                    error, step = _prepare(cases[line.strip()], device)
                    _send(answers, {"error": error})
            except Exception as reason:
                _send(answers, {"failed": describe(reason)})


def _prepare(case: Case, device: torch.device) -> tuple[float, Callable[[], dict[str, float]]]:
    make, tensors = makers_for(case)["fastlora"], make_tensors(case, device)
    error = Judge(case, tensors, known_masks=False).error("fastlora", make, not case.decodes)
    step = step_of(case, make(case, tensors, case.dropout), tensors, clock_for(device))

    def alone() -> dict[str, float]:
        with threads_for(case):
            return step()

    return error, alone


def _send(answers, answer: dict) -> None:
    answers.write(f"{json.dumps(answer)}\n")
    answers.flush()


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def _remove(folder: Path) -> None:
    _git("worktree", "remove", "--force", str(folder / "tree"))
    shutil.rmtree(folder, ignore_errors=True)
    _git("worktree", "prune")
