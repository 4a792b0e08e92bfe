"""Where fastlora is imported from, a plain folder or another commit's, and processes that do so."""

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
    """Finds fastlora in a folder; the benchmarks are always these here.

    ``sys.path`` could not: kernels/ is installed as fastlora.kernels (setup.py), and under its own
    name it would hide Hugging Face's package ``kernels``.
    """

    def __init__(self, root: Path) -> None:
        self.folders = {
            "fastlora": root / "fastlora",
            "fastlora.kernels": root / "kernels",
            "benchmarks": BENCHMARKS,
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None or not (folder / "__init__.py").exists():
            return None
        return spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def import_from(root: Path = ROOT) -> None:
    """From now on ``import fastlora`` and ``import benchmarks`` find this folder's.

    A script's folder leaves the path, where its ``report`` or ``judge`` could be taken for others.
    """
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != BENCHMARKS]
    sys.meta_path.insert(0, _Tree(root))


class Worker:
    """A process with the fastlora of a folder.  It answers what is asked of a module's ``Served``:

    a request is a line of JSON with the name of a method and its arguments, an answer another.
    """

    def __init__(
        self, root: Path, module: str, device: str, environment: dict[str, str] | None = None
    ) -> None:
        # It lives as long as the process.
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / "tree.py"), str(root), module, device],
            cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, start_new_session=True,  # a Ctrl-C is this process's business
        )  # fmt: skip

    def ask(self, *request: str, seconds: float = 600.0) -> dict:
        """The answer; a RuntimeError with what was printed if there is none in time."""
        timer = Timer(seconds, self.process.kill)
        timer.start()
        with suppress(BrokenPipeError):  # what was printed says why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            failed = f"the process ended with {self.process.wait()}, {seconds:.0f} s at most"
        elif "failed" not in (answer := json.loads(line)):
            return answer
        else:
            failed = answer["failed"]
        self.log.seek(0)
        raise RuntimeError(f"{self.log.read()[-1500:]}\n{failed}".strip())

    def close(self) -> None:
        """With all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serve(served: object) -> None:
    """A worker's side.  Standard output is for answers: what libraries print goes to the log."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            try:
                answer = getattr(served, name)(*arguments)
            except Exception as error:
                answer = {"failed": describe(error)}
            print(json.dumps(answer), file=answers, flush=True)


def describe(error: Exception) -> str:
    """Kind and text, cut where a compiler is verbose, and the place in the sources."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)
    text = text if len(text) <= 1500 else f"{text[:1000]} … {text[-500:]}"
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


if __name__ in ("__main__", "__mp_main__"):  # python tree.py ROOT MODULE DEVICE; its processes
    import_from(Path(sys.argv[1]))
if __name__ == "__main__":
    serve(import_module(sys.argv[2]).Served(sys.argv[3]))
