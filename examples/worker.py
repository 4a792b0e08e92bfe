"""The processes of finetune.py: each works when told to, and none outlives it."""

import contextlib
import importlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

# All are forks of one process that has imported these and computed nothing: it saves seconds each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.trainer", "transformers.models.auto", "fastlora"])


def start_server() -> None:
    """Start the process that all workers come from.

    Neither it nor they see Ctrl-C: finetune.py does, ends them, and removes what they wrote.
    """
    resource_tracker.ensure_running()  # first, since it would take the mask off
    with uninterrupted():  # which they inherit
        forkserver.ensure_running()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A Ctrl-C in it comes after it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class Worker:
    """``main(run)`` of a module of this folder, in a process of its own.

    What main returns is its last answer; before, it may send others to ``run.parent``, and wait
    there for a word to go on.
    """

    def __init__(self, name: str, module: str, settings: dict) -> None:
        self.name = name
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(module, theirs), daemon=True)
        with uninterrupted():  # half a start would print an error of its own
            self.process.start()
        theirs.close()  # so that its end is seen here
        self.pipe.send(settings)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, error: object, *details: object) -> None:
        if error:
            self.process.kill()
        self.process.join()

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
            how += ", as if memory ran out" * (-code == signal.SIGKILL)
        sys.exit(f"finetune.py: error: {self.name} ended with {how}")

    def go(self) -> Any:
        """Let it go on to its next answer."""
        with contextlib.suppress(OSError):  # if it has ended, answer tells
            self.pipe.send("go")
        return self.answer()


def run(name: str, module: str, settings: dict) -> Any:
    """The one answer of a worker."""
    with Worker(name, module, settings) as worker:
        return worker.answer()


def work(module: str, parent: Connection) -> None:
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own needs a semaphore, which a killed process leaves
    try:
        settings = parent.recv()
    except EOFError:  # interrupted before it began
        return
    answer = importlib.import_module(module).main(SimpleNamespace(**settings, parent=parent))
    with contextlib.suppress(BrokenPipeError):
        parent.send(answer)
