"""One row: the contestants of a case, judged first, then timed in shared rounds.

An absolute time says nothing on a shared machine, so every time is a ratio, taken in pairs: a
round runs all contestants in turn and gives one ratio of each two; reported are the quartiles.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .cases import Case
from .clock import Clock, HostClock, clock_for, peak_of, timed, wait_for
from .contestants import Contestant, Maker, Tensors
from .judge import Judge, kept_for_backward
from .lineup import make_tensors, makers_for
from .tree import last_error

Step = Callable[[], dict[str, float]]  # runs once, and returns the seconds of each quantity
_LEAST, _MOST = 5, 300  # rounds


def in_turn(steps: dict[str, Step], seconds: float = 0.0, rounds: int = 0) -> dict:
    """So many rounds, or as many as fit into the seconds, of a turn of each.

    A turn is a step that is not timed and then one that is, so that every timed step finds the
    caches and the heap as its own kind leaves them.  Without that, whoever comes after PEFT pays
    for what PEFT left: of two equal frozen layers the second took 0.85 of the first one's time
    (x [4096, 1024], weight [1024, 1024], bfloat16, 2 cores).

    Medians of each one's seconds; quartiles of ratios: over the first's, the last's over each, and
    PEFT's optimised over its own.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(rounds or _fitting(steps, seconds)):
        for name, step in steps.items():
            step()
            times[name].append(step())
    first, *others = times
    pairs = [(name, first) for name in others] + [(others[-1], name) for name in others[:-1]]
    if {"peft", "peft, optimized"} <= set(others):
        pairs.append(("peft, optimized", "peft"))
    count = len(times[first])
    found: dict = {"rounds": count, "seconds": {}, "ratios": {}}
    for quantity in times[first][0]:
        of = {name: [each[quantity] for each in its] for name, its in times.items()}
        found["seconds"][quantity] = {name: digits(statistics.median(of[name])) for name in of}
        found["ratios"][quantity] = {f"{a}/{b}": ratios(of[a], of[b]) for a, b in pairs}
    return found


def _fitting(steps: dict[str, Step], seconds: float) -> int:
    """How many rounds fit, after a warm-up."""
    for _ in range(2):
        start = time.perf_counter()
        for step in steps.values():
            step()
        round_seconds = 2 * (time.perf_counter() - start)
    return min(max(int(seconds / round_seconds), _LEAST), _MOST)


def measure(
    case: Case, device: torch.device, seconds: float = 0.0, rounds: int = 0,
    makers: dict[str, Maker] | None = None,
) -> dict:  # fmt: skip
    """A row, of so many rounds or seconds of them.

    A contestant that is wrong or raises has no time; the reason is in ``failures``.
    """
    tensors, clock = make_tensors(case, device), clock_for(device)
    judge = Judge(case, tensors)
    steps: dict[str, Step] = {}
    known: dict[str, dict] = {"errors": {}, "saved": {}, "failures": {}, "skipped": {}}
    with threads_for(case):
        for name, make in (makers or makers_for(case)).items():
            print(f"{case.id}: {name}", file=sys.stderr)  # the last words of a process that dies
            try:
                worst = judge.error(name, make)
                contestant = make(case, tensors, case.dropout)
                known["saved"][name] = kept_for_backward(contestant, tensors)
                step = step_of(case, contestant, tensors, clock)
                step()
                if case.has_peak:
                    known.setdefault("peak", {})[name] = peak_of(step, device)
                wait_for(device)
                known["errors"][name], steps[name] = digits(worst), step
            except ModuleNotFoundError as reason:  # nothing is wrong
                known["skipped"][name] = str(reason)
            except Exception:
                known["failures"][name] = last_error()
                wait_for(device)  # if the device is lost, nobody else can run
        both = {"frozen", "fastlora"} <= set(steps)
        summary = in_turn(steps, seconds, rounds) if both else {}
    return row_of(case, summary, **known)


def row_of(case: Case, summary: dict, **known: dict) -> dict:
    """Plain data for JSON.  Without a summary nothing was timed, and ``failures`` say why."""
    row = {"id": case.id, "table": case.table, **known, "rounds": 0, "seconds": {}, "ratios": {}}
    return row | summary


def step_of(case: Case, contestant: Contestant, tensors: Tensors, clock: Clock) -> Step:
    """All that is timed of a contestant, one quantity after the other."""
    module, x, leaves = contestant.module, tensors.x, contestant.leaves(tensors.x)

    def inference() -> object:
        with torch.no_grad():
            return module(x)

    def train(mark: Callable[[], Any] = lambda: None) -> list:
        """Forward, backward and the release of what they made, which is part of the price."""
        marks = [mark()]
        ys = module(x)
        marks.append(mark())
        torch.autograd.backward(ys, tensors.dys)
        del ys
        contestant.finish()
        for leaf in leaves:
            leaf.grad = None
        return [*marks, mark()]

    # Quantity, clock, call, and how many in a row: for a clock that is coarse beside one call.
    calls: list[tuple[str, Clock, Callable[[], object], int]] = []
    wall, own = HostClock(x.device), HostClock(x.device, time.process_time)
    if case.table == "few":
        named = {"forward": lambda: module(x), "inference": inference, "both": train}
        calls += [(quantity, own, call, 5) for quantity, call in named.items()]
    elif case.table == "gpu":
        calls.append(("wall", wall, train, 20))

    def step() -> dict[str, float]:
        seconds = {}
        with contestant.chosen():
            if case.table != "few":
                clock.start()
                start, middle, end = train(clock.mark)
                seconds["forward"] = clock.seconds(start, middle)
                seconds["both"] = clock.seconds(start, end)
            for quantity, its_clock, call, count in calls:
                seconds[quantity] = timed(its_clock, call, 1 if case.tiny else count)
        return seconds

    return step


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the pairs."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    pairs *= 1 + (len(pairs) == 1)
    return [digits(each) for each in statistics.quantiles(pairs, n=4, method="inclusive")]


def digits(value: float) -> float:
    """Five significant ones: no time here is known better."""
    return float(f"{value:.5g}")


@contextmanager
def threads_for(case: Case) -> Iterator[None]:
    """One thread where CPU time is the caller's, or where others would only be waited for."""
    before = torch.get_num_threads()
    if case.tiny or case.table in ("host", "few"):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
