"""One row: the contestants of a case, verified first, then timed in shared rounds.

An absolute time means nothing on a shared machine, so every time is a ratio of a pair.  A round
runs all contestants in turn and gives one ratio for each pair; a row has the quartiles of rounds.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastlora.common.clock import Clock, HostClock, clock_for, timed, wait_for

from .cases import Case
from .contestants import Contestant, Maker, Tensors
from .graphs import graph_of, peak_of
from .judge import Judge, check_kept, kept_for_backward
from .lineup import make_tensors, makers_for
from .tree import last_error

Step = Callable[[], dict[str, float]]  # runs once, and returns the seconds of each quantity
_LEAST, _MOST = 5, 300  # rounds


def in_turn(steps: dict[str, Step], seconds: float = 0.0, rounds: int = 0) -> dict:
    """Run ``rounds`` rounds, or as many as fit into the seconds; a round has one turn of each step.

    A turn is an untimed step and then a timed one, so that every timed step finds the caches and
    the heap in the state that the same step leaves.  Without the untimed step, a step after PEFT's
    pays for PEFT's state: of two equal frozen layers, the second took 15 % less time than the first
    (x [4096, 1024], weight [1024, 1024], bfloat16, 2 cores).

    Returns each step's median seconds, and quartiles of ratios: of each to the first, and of the
    last to each.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(rounds or _fitting(steps, seconds)):
        for name, step in steps.items():
            step()
            times[name].append(step())
    first, *others = times
    pairs = [(name, first) for name in others] + [(others[-1], name) for name in others[:-1]]
    found: dict = {"rounds": len(times[first]), "seconds": {}, "ratios": {}}
    for quantity in times[first][0]:
        of = {name: [each[quantity] for each in its] for name, its in times.items()}
        found["seconds"][quantity] = {name: digits(statistics.median(of[name])) for name in of}
        found["ratios"][quantity] = {f"{a}/{b}": ratios(of[a], of[b]) for a, b in pairs}
    return found


def _fitting(steps: dict[str, Step], seconds: float) -> int:
    """The number of rounds that fit, after a warm-up."""
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
    """A row, measured in ``rounds`` rounds or within ``seconds``.

    A contestant that is wrong, saves too much or raises an error gets no time; ``failures`` has the
    reason.
    """
    tensors, clock = make_tensors(case, device), clock_for(device)
    judge = Judge(case, tensors)
    steps: dict[str, Step] = {}
    known: dict[str, dict] = {"errors": {}, "saved": {}, "failures": {}, "skipped": {}}
    with threads_for(case):
        for name, make in (makers or makers_for(case)).items():
            print(f"{case.id}: {name}", file=sys.stderr)  # for the log, if the process dies
            try:
                worst = judge.error(name, make, backward=not case.decodes)
                contestant = make(case, tensors, case.dropout)
                if not case.decodes:
                    known["saved"][name] = kept = kept_for_backward(contestant, tensors)
                    if name == "fastlora" and not case.by_peft:
                        check_kept(case, kept, tensors)
                step = step_of(case, contestant, tensors, clock)
                step()
                if case.has_peak:
                    known.setdefault("peak", {})[name] = peak_of(step, device)
                wait_for(device)
                known["errors"][name], steps[name] = digits(worst), step
            except ModuleNotFoundError as reason:  # not a failure
                known["skipped"][name] = str(reason)
            except Exception:
                known["failures"][name] = last_error()
                wait_for(device)  # raises if the device is lost, and ends the run
        both = {"frozen", "fastlora"} <= set(steps)
        summary = in_turn(steps, seconds, rounds) if both else {}
    return row_of(case, summary, **known)


def row_of(case: Case, summary: dict, **known: dict) -> dict:
    """Plain data for JSON, with each measured target.

    Without a summary nothing was timed, and ``failures`` has the reasons.
    """
    row = {"id": case.id, "table": case.table, **known, "rounds": 0, "seconds": {}, "ratios": {}}
    row |= {**summary, "targets": []}
    for quantity, ratio, limit in case.targets if summary else ():
        value = _value(row, quantity, ratio)
        if value is not None:
            target = {"quantity": quantity, "ratio": ratio, "limit": limit, "value": value}
            row["targets"].append(target | {"met": value <= limit})
    return row


def _value(row: dict, quantity: str, ratio: str) -> float | None:
    """The median of a time's ratio, a ratio of bytes, or MiB; None if it was not measured."""
    if quantity in row["ratios"]:
        return row["ratios"][quantity].get(ratio, [None] * 3)[1]
    sizes = {"kept": {n: sum(each.values()) for n, each in row.get("saved", {}).items()}}
    sizes |= {"peak": row.get("peak", {})}
    sizes = {name: {**each, "MiB": 2**20} for name, each in sizes.items()}
    above, below = (sizes.get(quantity, {}).get(name) for name in ratio.split("/"))
    return digits(above / below) if above and below else None


def step_of(case: Case, contestant: Contestant, tensors: Tensors, clock: Clock) -> Step:
    """A step that times all quantities of a contestant, one after the other."""
    module, x, leaves = contestant.module, tensors.x, contestant.leaves(tensors.x)

    def inference() -> object:
        with torch.no_grad():
            return module(x)

    def train(mark: Callable[[], Any] = lambda: None) -> list:
        """Forward, backward, and freeing their tensors, whose time is included."""
        marks = [mark()]
        ys = module(x)
        marks.append(mark())
        torch.autograd.backward(ys, tensors.dys)
        del ys
        contestant.finish()
        for leaf in leaves:
            leaf.grad = None
        return [*marks, mark()]

    # Quantity, clock, call, and calls in a row, because a clock may be too coarse for one call.
    calls: list[tuple[str, Clock, Callable[[], object], int]] = []
    wall = HostClock(x.device)
    own_time = case.calls_in_a_row > 1
    if own_time:
        own, count = HostClock(x.device, time.process_time), case.calls_in_a_row
        named = {"forward": lambda: module(x), "inference": inference, "both": train}
        calls += [(quantity, own, call, count) for quantity, call in named.items()]
    elif case.decodes:
        with contestant.chosen():
            calls += [("inference", clock, inference, 1), ("graph", clock, graph_of(inference), 1)]
        calls.append(("wall", wall, inference, 20))
    elif case.table == "gpu":
        calls.append(("wall", wall, train, 20))

    def step() -> dict[str, float]:
        seconds = {}
        with contestant.chosen():
            if not case.decodes and not own_time:
                clock.start()
                start, middle, end = train(clock.mark)
                seconds["forward"] = clock.seconds(start, middle)
                seconds["both"] = clock.seconds(start, end)
            for quantity, its_clock, call, count in calls:
                seconds[quantity] = timed(its_clock, call, 1 if case.tiny else count)
        return seconds

    return step


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the pairs' ratios."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    pairs *= 1 + (len(pairs) == 1)
    return [digits(each) for each in statistics.quantiles(pairs, n=4, method="inclusive")]


def digits(value: float) -> float:
    """Five significant digits, because times are not more precise."""
    return float(f"{value:.5g}")


@contextmanager
def threads_for(case: Case) -> Iterator[None]:
    """A context: one thread if the caller's CPU time is measured, or if more threads only wait."""
    before = torch.get_num_threads()
    if case.tiny or case.table == "host" or case.calls_in_a_row > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
