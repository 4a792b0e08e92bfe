"""Processes of one gloo group, which run a function together whenever a test asks for it."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from unittest import mock

import torch.distributed as dist
from process import forkserver

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
    from fastlora.ops import way

    way.MOST_ROWS = 0  # the node is what is tested, and small models have few rows
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)


def _call(task: bytes) -> bytes:
    """Bytes both ways: tensors would travel as shared memory, which ends with the process."""
    function, arguments, settings = pickle.loads(task)
    return pickle.dumps(function(*arguments, **settings))
