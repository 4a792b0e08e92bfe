"""Clocks: the seconds from a step's start to the end of each of its parts.

On a GPU: CUDA events.  Before the first event a kernel waits, so that the host has issued the
step before the device begins it, and launches cost the device's time alone; what a host-bound
caller feels is the small shapes' business, which are timed in a CUDA graph as well.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

Lap = Callable[[], None]
Step = Callable[[Lap], object]  # calls its argument at the end of each part

_LEAST_AHEAD, _MOST_AHEAD = 0.5e-3, 16e-3  # seconds
_CYCLES = 10_000_000


class CudaClock:
    """``late`` counts times that the host was too slow for, and that therefore hold its gaps."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.late = device, 0
        properties = torch.cuda.get_device_properties(device)
        self.l2_bytes = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self.scratch = torch.zeros(self.l2_bytes, dtype=torch.int32, device=device)  # 4 times L2
        self.ahead, self.cycles = _LEAST_AHEAD, 0.0
        for _ in range(2):  # the first one includes the kernel's loading
            events: list[torch.cuda.Event] = []
            self._record(events)
            torch.cuda._sleep(_CYCLES)
            self._record(events)
            torch.cuda.synchronize(device)
            self.cycles = _CYCLES / (events[0].elapsed_time(events[1]) / 1e3)  # a second

    def time(self, step: Step, flush: bool = False) -> list[float]:
        """``flush``: read so much else before that nothing of the step's is left in L2."""
        while True:
            if flush:
                self.scratch.sum()
            torch.cuda._sleep(int(self.ahead * self.cycles))
            events: list[torch.cuda.Event] = []
            lap = partial(self._record, events)
            lap()
            step(lap)
            late = events[0].query()
            torch.cuda.synchronize(self.device)
            if not late or self.ahead >= _MOST_AHEAD:
                self.late += late
                return [events[0].elapsed_time(event) / 1e3 for event in events[1:]]
            self.ahead *= 2

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """A CUDA graph of these calls as one function, which returns what the first one returns."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]

        def replay() -> object:
            graph.replay()
            return results[0]

        return replay

    def _record(self, events: list[torch.cuda.Event]) -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()


class HostClock:
    """The stand-in on a CPU: the same meaning, by the host's clock, and no graphs."""

    l2_bytes, late = 0, 0

    def time(self, step: Step, flush: bool = False) -> list[float]:
        laps = [time.perf_counter()]
        step(lambda: laps.append(time.perf_counter()))
        return [lap - laps[0] for lap in laps[1:]]

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        def replay() -> object:
            results = [call() for call in calls]
            return results[0]

        return replay


Clock = CudaClock | HostClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def whole(call: Callable[[], object]) -> Step:
    """A step of one part."""

    def step(lap: Lap) -> None:
        call()
        lap()

    return step


def quartiles(values: Sequence[float]) -> list[float]:
    """Five significant digits: no time here is known better."""
    if len(values) == 1:
        values = [*values, *values]
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{value:.5g}") for value in cuts]


def digits(value: float) -> float:
    """As many as a measurement has."""
    return float(f"{value:.4g}")
