"""Runs Python code in a new process, and functions in the processes of a gloo group."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

_TIMEOUT = 300.0  # the limit for one function in seconds; on an idle machine they take far less
# Imported once, in the process from which the others are forked.
_IMPORTS = [
    "peft.utils.other",
    "torch.distributed._composable.replicate_with_fsdp",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.distributed.configuration_utils",
    "transformers.models.llama.modeling_llama",
    "triton",
]


def forkserver() -> ForkServerContext:
    """Its processes have imported torch, transformers and PEFT, but nothing of fastlora."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


def run_forked(code: str, *arguments: object, **environment: str) -> str:
    """The output of ``code`` in a process of :func:`forkserver`, with these ``sys.argv[1:]``."""
    return run_together(code, [environment], *arguments)[0]


def run_together(code: str, environments: list[dict[str, str]], *arguments: object) -> list[str]:
    """:func:`run_forked` in a process for each environment, all at the same time."""
    tasks = [(code, [*map(str, arguments)], each) for each in environments]
    with (
        mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        forkserver().Pool(len(tasks), maxtasksperchild=1) as pool,
    ):
        return pool.starmap_async(_printed, tasks, chunksize=1).get(_TIMEOUT)


def _printed(code: str, arguments: list[str], environment: dict[str, str]) -> str:
    sys.argv[1:] = arguments
    os.environ.update(environment)
    with redirect_stdout(StringIO()) as printed:
        exec(code, {})
    return printed.getvalue().strip()


def run_python(
    *arguments: str | Path,
    python: str | Path = sys.executable,
    cwd: str | Path = "/",
    **environment: str | None,
) -> str:
    """The output of Python, run outside of the repository unless ``cwd`` is given.

    ``environment`` is added to this process's environment; None removes a variable.  If the process
    fails, raises AssertionError with everything it wrote.
    """
    # Without xdist's variables, so that a pytest in there doesn't act as a worker of this one.
    here = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST_")}
    merged = {key: value for key, value in (here | environment).items() if value is not None}
    result = subprocess.run(
        [python, *arguments], capture_output=True, text=True, cwd=cwd, env=merged, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def run_without_interpreter(*arguments: str | Path) -> str:
    """:func:`run_python` in the repository, without Triton's interpreter.

    ``FASTLORA_COMPILE_TRITON`` names a folder with another version of Triton to use.
    """
    other_triton = os.environ.get("FASTLORA_COMPILE_TRITON", "")
    root = Path(__file__).parents[2]
    return run_python(*arguments, cwd=root, TRITON_INTERPRET=None, PYTHONPATH=other_triton)


class Ranks:
    """``size`` processes of one gloo group.  Starting them takes seconds, so tests share them."""

    def __init__(self, size: int, folder: Path) -> None:
        # Some engines would use a visible GPU.  The forkserver keeps this environment.
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
            self._pools = [
                ProcessPoolExecutor(1, forkserver(), _join, (f"file://{folder}/store", rank, size))
                for rank in range(size)
            ]
            # The first task starts a pool's process.
            self.run(os.getpid)

    @property
    def usable(self) -> bool:
        return bool(self._pools)

    def run(self, function: Callable, *arguments: Any, **settings: Any) -> list[Any]:
        """The results of ``function(*arguments, **settings)`` in each rank.

        The first error in a rank becomes a RuntimeError whose cause has that rank's traceback.  All
        processes are then ended, because the other ranks may be waiting for it.  ``function`` must
        be importable.
        """
        task = pickle.dumps((function, arguments, settings))
        answers = [pool.submit(_call, task) for pool in self._pools]
        try:
            for answer in as_completed(answers, timeout=_TIMEOUT):
                answer.result()
        except Exception as error:
            self.end()
            raise RuntimeError(f"a rank failed or took {_TIMEOUT} s") from error
        return [pickle.loads(answer.result()) for answer in answers]

    def close(self) -> None:
        """Let the processes leave the group and end."""
        if self.usable:
            self.run(dist.destroy_process_group)
        self.end()

    def end(self) -> None:
        for pool in self._pools:
            for process in [*(pool._processes or {}).values()]:
                process.kill()
            pool.shutdown()
        self._pools = []


def _join(store: str, rank: int, size: int) -> None:
    from fastlora.ops import few_rows

    few_rows.MOST_ROWS = 0  # small models have few rows, but the autograd node is under test
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)


def _call(task: bytes) -> bytes:
    """Run a pickled call and pickle its result.

    Tensors would otherwise travel as shared memory, which ends with the process.
    """
    function, arguments, settings = pickle.loads(task)
    return pickle.dumps(function(*arguments, **settings))
