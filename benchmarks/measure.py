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

from fastlora.clock import Clock, HostClock, clock_for, timed, wait_for

from .cases import Case
from .contestants import Contestant, Maker, Tensors
from .graphs import graph_of, peak_of
from .judge import Judge, check_kept, kept_for_backward
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

    Seconds of each, median and 10th percentile; quartiles of ratios: over the first's, the last's
    over each, and PEFT's optimized over its own.
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
    found: dict = {"rounds": count, "seconds": {}, "tenths": {}, "ratios": {}}
    for quantity in times[first][0]:
        of = {name: [each[quantity] for each in its] for name, its in times.items()}
        found["seconds"][quantity] = {name: digits(statistics.median(of[name])) for name in of}
        found["tenths"][quantity] = {name: digits(sorted(of[name])[count // 10]) for name in of}
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

    A contestant that is wrong, keeps too much or raises has no time; the reason is in ``failures``.
    """
    tensors, clock = make_tensors(case, device), clock_for(device)
    judge = Judge(case, tensors)
    steps: dict[str, Step] = {}
    known: dict[str, dict] = {"errors": {}, "saved": {}, "failures": {}, "skipped": {}}
    with threads_for(case):
        for name, make in (makers or makers_for(case)).items():
            print(f"{case.id}: {name}", file=sys.stderr)  # the last words of a process that dies
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
            except ModuleNotFoundError as reason:  # nothing is wrong
                known["skipped"][name] = str(reason)
            except Exception:
                known["failures"][name] = last_error()
                wait_for(device)  # if the device is lost, nobody else can run
        both = {"frozen", "fastlora"} <= set(steps)
        summary = in_turn(steps, seconds, rounds) if both else {}
    return row_of(case, summary, **known)


def row_of(case: Case, summary: dict, **known: dict) -> dict:
    """Plain data for JSON, with each target that was measured.

    Without a summary nothing was timed, and ``failures`` say why.
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
    """The median of a time's ratio, or a ratio of bytes, also to a MiB; None: not measured."""
    if quantity in row["ratios"]:
        return row["ratios"][quantity].get(ratio, [None] * 3)[1]
    sizes = {"kept": {n: sum(each.values()) for n, each in row.get("saved", {}).items()}}
    sizes |= {"peak": row.get("peak", {})}
    sizes = {name: {**each, "MiB": 2**20} for name, each in sizes.items()}
    above, below = (sizes.get(quantity, {}).get(name) for name in ratio.split("/"))
    return digits(above / below) if above and below else None


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
    if case.tiny or case.table == "host" or case.calls_in_a_row > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
