"""Python in a process of its own, and processes of one gloo group."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing.context import ForkServerContext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from unittest import mock

import torch.distributed as dist

# Imported once, in the process that the others are forked from.
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
    """Its processes have imported torch, transformers and PEFT, and nothing of fastlora."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


def run_forked(code: str, *arguments: object, **environment: str) -> str:
    """What ``code`` prints in such a process, with these ``sys.argv[1:]``."""
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""), forkserver().Pool(1) as pool:
        return pool.apply(_printed, (code, [*map(str, arguments)], environment))


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
    """What it prints, outside of the repository unless ``cwd`` says so.

    ``environment`` is beside this process's, None for what shall not be in it.  An AssertionError
    with all that it wrote if it fails.
    """
    # A pytest in it is no worker of this one's.
    here = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST_")}
    merged = {key: value for key, value in (here | environment).items() if value is not None}
    result = subprocess.run(
        [python, *arguments], capture_output=True, text=True, cwd=cwd, env=merged, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def run_without_interpreter(*arguments: str | Path) -> str:
    """As :func:`run_python`, in the repository: for what may not interpret the kernels.

    ``FASTLORA_COMPILE_TRITON`` names a folder with another Triton, which then takes part.
    """
    other_triton = os.environ.get("FASTLORA_COMPILE_TRITON", "")
    root = Path(__file__).parents[2]
    return run_python(*arguments, cwd=root, TRITON_INTERPRET=None, PYTHONPATH=other_triton)


_TIMEOUT = 300.0  # seconds that a function may take; they are far shorter on an idle machine


class Ranks:
    """``size`` processes.  Starting them costs seconds, so that tests share them."""

    def __init__(self, size: int, folder: Path) -> None:
        context = forkserver()
        # Engines would take a GPU that they see; the forkserver keeps this environment.
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
            self._pools = [
                context.Pool(1, _join, (f"file://{folder}/store", rank, size))
                for rank in range(size)
            ]

    @property
    def usable(self) -> bool:
        return bool(self._pools)

    def run(self, function: Callable, *arguments: Any, **settings: Any) -> list[Any]:
        """What ``function(*arguments, **settings)`` returned in each rank.

        The first error in a rank is a RuntimeError whose cause has that rank's traceback; the
        processes are ended then, as the others may wait for it.  Functions come from importable
        modules.
        """
        task, done = pickle.dumps((function, arguments, settings)), SimpleQueue()
        for rank, pool in enumerate(self._pools):
            put = lambda answer, rank=rank: done.put((rank, answer))  # noqa: E731
            pool.apply_async(_call, (task,), callback=put, error_callback=put)
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pools):
            try:
                rank, answer = done.get(timeout=_TIMEOUT)
            except Empty:
                self.end()
                raise RuntimeError(f"no answer within {_TIMEOUT} s") from None
            if isinstance(answer, Exception):
                self.end()
                raise RuntimeError(f"rank {rank}") from answer
            answers[rank] = pickle.loads(answer)
        return [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        """Let the processes leave the group and come to their end."""
        if self.usable:
            self.run(dist.destroy_process_group)
        self.end()

    def end(self) -> None:
        for pool in self._pools:
            pool.terminate()
        self._pools = []


def _join(store: str, rank: int, size: int) -> None:
    from fastlora.ops import dispatch

    dispatch.MOST_ROWS = 0  # the node is what is tested, and small models have few rows
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)


def _call(task: bytes) -> bytes:
    """Bytes both ways: tensors would travel as shared memory, which ends with the process."""
    function, arguments, settings = pickle.loads(task)
    return pickle.dumps(function(*arguments, **settings))
