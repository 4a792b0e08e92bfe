"""The processes of finetune.py: each works when told to, and none outlives it."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# All are forks of one process that has imported these and computed nothing: it saves seconds each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.trainer", "transformers.models.auto", "fastlora"])


class Worker:
    """``main(run)`` of a module of this folder, in a process of its own.

    It may send answers to ``run.parent``, and wait there for a word to go on, which fails where
    finetune.py has ended; what it returns is its last answer.
    """

    def __init__(self, name: str, module: str, settings: dict) -> None:
        self.name = name
        self.pipe, theirs = CONTEXT.Pipe()
        run = SimpleNamespace(**settings, parent=theirs)
        self.process = CONTEXT.Process(target=work, args=(module, run), daemon=True)
        # Ctrl-C waits until it has started, and since it inherits the mask, never reaches it.
        resource_tracker.ensure_running()  # first, since it takes the mask off
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        start_forkserver()
        self.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()  # so that its end is seen here

    def answer(self) -> Any:
        """Its next answer; if it ends without one, this process ends too."""
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
        """Let it go on to its next answer."""
        with contextlib.suppress(OSError):  # if it has ended, answer tells
            self.pipe.send("go")
        return self.answer()


def start_forkserver() -> None:
    """Start it in this folder, the first on its path; a forked process changes to the caller's.

    In a clone's root, its imports would take ``kernels/`` for Hugging Face's package.
    """
    back = os.getcwd()
    os.chdir(Path(__file__).parent)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(back)


def run(name: str, module: str, settings: dict) -> Any:
    """The one answer of a worker."""
    worker = Worker(name, module, settings)
    answer = worker.answer()
    worker.process.join()
    return answer


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder for what is not whole yet; it goes in the end, and before it who may write there."""
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

    tqdm.set_lock(threading.RLock())  # its own needs a semaphore, which a killed process leaves
    run.parent.send(importlib.import_module(module).main(run))
