"""Processes of one gloo group, which run a function together whenever a test asks for it."""

import contextlib
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# Imported once, in the process that all ranks are forked from.
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
_TIMEOUT = 120.0  # seconds that a function may take; they are far shorter


class Ranks:
    """``size`` processes.  Starting them costs seconds, so that tests share them."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTS)
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, f"{folder}/store", there), daemon=True
            )
            # Engines would take a GPU that they see; the forkserver keeps this environment.
            with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
                process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    @property
    def usable(self) -> bool:
        return bool(self._processes)

    def run(self, function: Callable, *arguments: Any, **settings: Any) -> list[Any]:
        """What ``function(*arguments, **settings)`` returned in each rank.

        The first error in a rank is a RuntimeError with that rank's traceback; the processes are
        ended then, as the others may wait for it.  Functions come from importable modules.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments, settings)))
        answers: dict[int, Any] = {}
        end = time.monotonic() + _TIMEOUT
        while len(answers) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            failure = "" if ready else f"no answer within {_TIMEOUT} s"
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    answers[rank], failure = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    failure = "the process ended"
                if failure:
                    failure = f"rank {rank}: {failure}"
                    break
            if failure:
                self.end()
                raise RuntimeError(failure)
        return [answers[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """Let the processes come to their end."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(timeout=10)
        self.end()

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := pickle.loads(pipe.recv_bytes())) is not None:
        function, arguments, settings = task
        failed = False
        try:
            answer = pickle.dumps((function(*arguments, **settings), ""))
        except BaseException:
            answer, failed = pickle.dumps((None, traceback.format_exc())), True
        pipe.send_bytes(answer)
        if failed:
            sys.exit(1)
    dist.destroy_process_group()
