"""The processes that finetune.py starts: they train when told, and never outlive it."""

import signal
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent


class Side:
    """One side's train_one.py: it stands still, and takes no time of a core, but in its turns."""

    def __init__(self, name: str, run_file: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.pipe, theirs = Pipe()
        self.process = start(
            ["train_one.py", run_file, theirs.fileno()], environment, pass_fds=[theirs.fileno()]
        )
        theirs.close()  # so that its end is seen here

    def wait(self) -> dict:
        """Until it has done its turn: what it tells of its last step."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            fail(self.name, self.process.wait())

    def step(self) -> dict:
        """Let it train one step, with the evaluation that may follow."""
        self._go()
        return self.wait()

    def finish(self) -> None:
        """Let it do what follows the training, and end."""
        self._go()
        if code := self.process.wait():
            fail(self.name, code)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _go(self) -> None:
        try:
            self.pipe.send("go")
        except OSError:
            fail(self.name, self.process.wait())


def run(script: str, argument: Path, environment: dict[str, str], **settings) -> None:
    """Run a script to its end, and leave with a message if it fails."""
    process = start([script, argument], environment, **settings)
    try:
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if code:
        fail(script, code)


def start(command: list, environment: dict[str, str], **settings) -> subprocess.Popen:
    """Start a script of this folder.

    It doesn't see Ctrl-C: this process does, ends it, and removes what it wrote.
    """
    script, *arguments = command
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        **settings,
    )


def fail(name: str, code: int) -> NoReturn:
    """Leave when a process ended early."""
    if code == 2:  # options.stop: it has said why
        sys.exit(2)
    how = f"exit code {code}, for the reason above"
    if code < 0:
        how = f"signal {signal.Signals(-code).name}"
        how += ", as if memory ran out" if -code == signal.SIGKILL else ""
    sys.exit(f"finetune.py: error: {name} ended with {how}")
