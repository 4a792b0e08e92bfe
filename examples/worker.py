"""The processes of finetune.py.  Each works on request and ends with finetune.py."""

import contextlib
import importlib
import multiprocessing
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# All are forks of one process that has imported these modules and computed nothing, which saves
# seconds of imports in each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.trainer", "transformers.models.auto", "fastlora"])


class Worker:
    """A process that calls ``main(run)`` of a module in this folder.

    ``main`` may send answers to ``run.parent`` and wait there for permission to continue.  Waiting
    fails if finetune.py has ended.  The result of ``main`` is the last answer.
    """

    def __init__(self, name: str, module: str, settings: dict) -> None:
        self.name = name
        self.pipe, theirs = CONTEXT.Pipe()
        run = SimpleNamespace(**settings, parent=theirs)
        self.process = CONTEXT.Process(target=work, args=(module, run), daemon=True)
        # Ctrl-C is blocked until the process has started.  The process inherits the mask, so Ctrl-C
        # never reaches it.
        resource_tracker.ensure_running()  # before the mask is set, because it removes the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        forkserver.ensure_running()
        self.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()  # so that answer() notices the end of the process

    def answer(self) -> Any:
        """The next answer.  If the process ends without one, this process also ends."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
        code = self.process.exitcode
        if code == 2:  # options.stop has said why
            sys.exit(2)
        how = f"exit code {code}, for the reason above"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
            how += ", as if memory ran out" * (code == -signal.SIGKILL)
        sys.exit(f"finetune.py: error: {self.name} ended with {how}")

    def go(self) -> Any:
        """Let the process continue to its next answer."""
        with contextlib.suppress(OSError):  # if the process has ended, answer() reports it
            self.pipe.send("go")
        return self.answer()


def run(name: str, module: str, settings: dict) -> Any:
    """The answer of a worker that gives only one."""
    worker = Worker(name, module, settings)
    answer = worker.answer()
    worker.process.join()
    return answer


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder for incomplete files.  At the end all workers are stopped and it is deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".finetune-", dir=folder) as scratch:
        try:
            yield Path(scratch)
        finally:
            end_all()


def end_all() -> None:
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def work(module: str, run: SimpleNamespace) -> None:
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, which a killed process leaks
    run.parent.send(importlib.import_module(module).main(run))
