"""Clocks that time a call on the host or on a GPU."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_AHEAD = 4_000_000  # GPU cycles, about 2 ms: the time that the host needs to launch a step
_CACHE = 256 * 2**20  # bytes, larger than the L2 cache of any GPU


class HostClock:
    """Host time.  ``read``: ``time.perf_counter``, or ``time.process_time`` for CPU time only.

    On a GPU, a mark waits until all launched work is done.
    """

    def __init__(self, device: torch.device, read: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.read = device, read

    def start(self) -> None:
        """Call this before the first mark of a step."""

    def mark(self) -> float:
        wait_for(self.device)
        return self.read()

    def seconds(self, before: float, after: float) -> float:
        return after - before


class CudaClock:
    """GPU time, by CUDA events and with a cleared L2 cache, as ``triton.testing.do_bench`` does.

    The device sleeps before the first mark, so that the host launches the whole step ahead of it.
    Gaps between launches are therefore not measured; ``benchmarks/measure.py`` measures wall time.
    """

    def __init__(self, device: torch.device) -> None:
        self.cache = torch.empty(_CACHE, dtype=torch.int8, device=device)

    def start(self) -> None:
        self.cache.zero_()
        torch.cuda._sleep(_AHEAD)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        after.synchronize()
        return before.elapsed_time(after) / 1e3


Clock = HostClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock(device)


def timed(clock: Clock, call: Callable[[], object], calls: int = 1) -> float:
    """Seconds per call, averaged over ``calls`` calls in a row."""
    clock.start()
    start: Any = clock.mark()
    for _ in range(calls):
        call()
    end: Any = clock.mark()
    return clock.seconds(start, end) / calls


def medians(
    clock: Clock, calls: Mapping[Any, Callable[[], object]], rounds: int
) -> dict[Any, float]:
    """Median seconds of each call, by name.  The calls take turns, so drift affects all alike."""
    laps = [{name: timed(clock, call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: median([lap[name] for lap in laps]) for name in calls}


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number of values the upper one of two."""
    return sorted(values)[len(values) // 2]


def wait_for(device: torch.device) -> None:
    """Wait until all launched work is done.  Errors of earlier launches are raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)
