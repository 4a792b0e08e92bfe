"""The worker of benchmarks/visit.py on the stand-in for CUDA, with sizes divided by 16.

Compiler processes, launches, clocks and graphs work as on a GPU.  torch's events are faked.  No
result is checked, because no kernel computes anything.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property
from multiprocessing import get_context

import cuda_standin
import torch

from benchmarks import calls, judge, measure, visit
from benchmarks.cases import Case
from benchmarks.forms import Form
from fastlora.common import clock


class Event:
    """Replaces torch.cuda.Event; it measures the host's time."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, after: "Event") -> float:
        return 1e3 * (after.at - self.at)


def small(part: object) -> object:
    if isinstance(part, list):
        return [small(each) for each in part]
    if isinstance(part, Case):
        outputs = tuple(N // 16 for N in part.outputs)
        name = f"quick-{part.name}"
        return replace(part, M=part.M // 16, K=part.K // 16, outputs=outputs, name=name)
    if isinstance(part, Form):
        depths = tuple(depth // 16 for depth in part.depths)
        return replace(part, M=part.M // 16, columns=part.columns // 16, depths=depths)
    raise TypeError(f"no smaller version of {part!r} is defined")


class Served(visit.Served):
    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.dry = False
        listed, own = self.listed().items(), ("sanitizer", "tests")  # these parts need a GPU
        self.parts = {key: small(part) for key, part in listed if key[0] not in own}
        self.dry = True  # one round, two configs

    def part(self, kind: str, name: str) -> dict:
        with cuda_standin.counted() as counts:
            row = super().part(kind, name)
        return row | {"launches": counts.total}

    @cached_property
    def pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(2, get_context("spawn"), initializer=in_the_pool)


def in_the_pool() -> None:
    """Unpickling it imports this module, which installs the stand-in."""


cuda_standin.install()
torch.cuda.Event, torch.cuda._sleep, torch.cuda.synchronize = Event, int, lambda *_: None
clock._CACHE, calls._SECONDS = 2**10, 3600.0
calls.clock_for = measure.clock_for = clock.CudaClock
calls.checked = judge.checked = lambda *_: 0.0
