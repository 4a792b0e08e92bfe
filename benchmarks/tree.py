"""Imports fastlora from a folder, such as another commit's, and starts processes that do so.

A *tree* is such a folder: the repository's root, with fastlora/ and kernels/.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from threading import Timer

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent


class _Tree(MetaPathFinder):
    """Finds fastlora in a tree.  The benchmarks are always this file's own.

    ``sys.path`` can't do this, because it would find kernels/ under its own name and not as
    fastlora.kernels (setup.py), and would hide Hugging Face's package ``kernels``.
    """

    def __init__(self, root: Path) -> None:
        self.folders = {"fastlora": root / "fastlora", "fastlora.kernels": root / "kernels"}
        self.folders["benchmarks"] = BENCHMARKS
        # One clock times all trees, and older trees don't have it.
        self.folders["fastlora.common.clock"] = ROOT / "fastlora" / "common" / "clock.py"
        if not (root / "fastlora" / "common").exists():
            self.folders["fastlora.common"] = ROOT / "fastlora" / "common"

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        location = self.folders.get(name)
        if location is not None and not location.suffix:
            location /= "__init__.py"
        return None if location is None else spec_from_file_location(name, location)


def import_from(root: Path = ROOT) -> None:
    """Make ``import fastlora`` and ``import benchmarks`` find the packages of the tree ``root``.

    benchmarks/, where Python puts a script's folder on the path, is removed from it, because
    modules such as ``report`` or ``judge`` could hide others of the same name.
    """
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != BENCHMARKS]
    sys.path.append(str(root / "tests" / "support"))  # as in pytest: oracles, vendors' layers
    sys.meta_path.insert(0, _Tree(root))


class Worker:
    """A process that imports a tree's fastlora and runs the requests of :meth:`ask`.

    ``module`` has a class ``Served``, which the process creates with ``device``.  A request is a
    line of JSON with the name of a method of ``Served`` and its arguments.  The answer is also a
    line.  After a failed request, the next one gets a new process.
    """

    def __init__(
        self, root: Path, module: str, device: str, environment: dict[str, str] | None = None
    ) -> None:
        self.command = [sys.executable, str(BENCHMARKS / "tree.py"), str(root), module, device]
        self.root, self.environment = root, environment
        self.process: subprocess.Popen | None = None

    def ask(self, *request: str, seconds: float = 600.0) -> dict:
        """Send a request and return the answer.

        After a failure, or ``seconds`` without an answer, raises RuntimeError with the end of the
        process's output.
        """
        process = self.process = self.process or self._start()
        timer = Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        with suppress(BrokenPipeError):  # the process has ended; its output has the reason
            print(json.dumps(request), file=process.stdin, flush=True)
        line = process.stdout.readline()
        timer.cancel()
        ended = None if line else f"the process ended with {process.wait()}"
        answer = json.loads(line) if line else {"failed": ended}
        if "failed" in answer:
            self.close()
            self.log.seek(0)
            raise RuntimeError(f"{self.log.read()[-1500:]}\n{answer['failed']}".strip())
        return answer

    def _start(self) -> subprocess.Popen:
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        return subprocess.Popen(
            self.command, cwd=self.root, env=self.environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log,
            start_new_session=True,  # only this process handles Ctrl-C
        )  # fmt: skip

    def close(self) -> None:
        """End the process and all processes that it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


def serve(served: object) -> None:
    """The worker's loop: run each request on ``served`` and print the answer."""
    # Only answers go to standard output.  Whatever libraries print there goes to the log.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            try:
                answer = getattr(served, name)(*arguments)
            except Exception:
                answer = {"failed": last_error()}
            print(json.dumps(answer), file=answers, flush=True)


def last_error() -> str:
    """The error that an except clause handles: kind, text and place, at most 1500 characters."""
    return traceback.format_exc(limit=-1)[-1500:]


# "__main__": python tree.py ROOT MODULE DEVICE.  "__mp_main__": a process that it starts.
if __name__ in ("__main__", "__mp_main__"):
    import_from(Path(sys.argv[1]))
if __name__ == "__main__":
    serve(import_module(sys.argv[2]).Served(sys.argv[3]))
