"""Clocks: marks in the course of a step, and the seconds between two."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_AHEAD = 4_000_000  # cycles, some two milliseconds: what the host needs to issue a step
_CACHE = 256 * 2**20  # bytes, more than any L2


class HostClock:
    """``read`` is ``time.perf_counter``, or ``time.process_time`` for the caller's own work.

    On a GPU a mark is when all that was issued is done.
    """

    def __init__(self, device: torch.device, read: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.read = device, read

    def start(self) -> None:
        """Before the first mark of a step."""

    def mark(self) -> float:
        wait_for(self.device)
        return self.read()

    def seconds(self, before: float, after: float) -> float:
        return after - before


class CudaClock:
    """The device's time, by events, as ``triton.testing.do_bench`` takes it: with an empty L2.

    The device waits before the first mark, so that the host issues the step ahead of it and its
    gaps are not measured; the wall time of many steps is a quantity of its own
    (``benchmarks/measure.py``).
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
    """Seconds of one call, of several in a row."""
    clock.start()
    start: Any = clock.mark()
    for _ in range(calls):
        call()
    end: Any = clock.mark()
    return clock.seconds(start, end) / calls


def medians(
    clock: Clock, calls: Mapping[Any, Callable[[], object]], rounds: int
) -> dict[Any, float]:
    """Seconds of each call, by its name; they take turns."""
    laps = [{name: timed(clock, call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: sorted(lap[name] for lap in laps)[rounds // 2] for name in calls}


def wait_for(device: torch.device) -> None:
    """Until everything that was issued is done; a lost device raises here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
