"""One row: the contestants of a case, judged first, then timed in shared rounds.

An absolute time says nothing on a shared machine, so every time is a ratio, taken in pairs: a
round runs all contestants in turn and gives one ratio of each two; reported are the quartiles.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .cases import DTYPE_NAMES, Case
from .clock import Clock, HostClock, clock_for, graph_of, timed, wait_for
from .contestants import Contestant, Maker, NotHereError, Tensors, make_tensors, makers_for
from .judge import Judge, check_kept, kept_for_backward

Step = Callable[[], dict[str, float]]  # runs once, and returns the seconds of each quantity
_LEAST, _MOST = 7, 300  # rounds


class Rounds:
    """Runs a turn of every contestant a round, and keeps the times.

    A turn is a step that is not timed and then one that is, so that every timed step finds the
    caches and the heap as its own kind leaves them.  Without that, whoever comes after PEFT pays
    for what PEFT left: of two equal frozen layers the second took 0.85 of the first one's time
    (x [4096, 1024], weight [1024, 1024], bfloat16, 2 cores).

    The last contestant is the subject: its timed step stands alone, for pytest-benchmark to watch.
    """

    def __init__(self, steps: dict[str, Step]) -> None:
        self.steps = steps
        self.times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        *self.before, self.subject = steps

    def run_others(self) -> None:
        for name in self.before:
            self.steps[name]()
            self.times[name].append(self.steps[name]())
        self.steps[self.subject]()

    def run_subject(self) -> None:
        self.times[self.subject].append(self.steps[self.subject]())

    def count(self, seconds: float) -> int:
        """How many rounds fit, after a warm-up."""
        for _ in range(2):
            start = time.perf_counter()
            for step in self.steps.values():
                step()
            round_seconds = 2 * (time.perf_counter() - start)
        return min(max(int(seconds / round_seconds), _LEAST), _MOST)

    def summary(self) -> dict:
        """Median seconds of each contestant; quartiles of the ratios of each two that matter."""
        first, *others = self.times
        pairs = [(name, first) for name in others]
        pairs += [(self.subject, name) for name in others if name != self.subject]
        seconds, found = {}, {}
        for quantity in self.times[self.subject][0]:
            of = {name: [each[quantity] for each in times] for name, times in self.times.items()}
            seconds[quantity] = {name: digits(statistics.median(each)) for name, each in of.items()}
            found[quantity] = {f"{a}/{b}": ratios(of[a], of[b]) for a, b in pairs}
        rounds = len(self.times[self.subject])
        return {"rounds": rounds, "seconds": seconds, "ratios": found}


def measure(
    case: Case, device: torch.device, run: Callable[[Rounds], None],
    makers: dict[str, Maker] | None = None, watch: Callable[[str], None] = lambda name: None,
) -> dict:  # fmt: skip
    """A row.  ``run`` runs the rounds; ``watch`` hears who is tried next.

    A contestant that is wrong, keeps too much or raises has no time; the reason is in ``failures``.
    """
    tensors, clock = make_tensors(case, device), clock_for(device)
    judge = Judge(case, tensors)
    steps: dict[str, Step] = {}
    known: dict[str, dict] = {"errors": {}, "saved": {}, "failures": {}, "skipped": {}}
    with threads_for(case):
        for name, make in (makers or makers_for(case)).items():
            watch(name)
            try:
                worst = judge.error(name, make, backward=not case.decodes)
                contestant = make(case, tensors, case.dropout)
                if not case.decodes and not name.startswith("compiled"):  # hooks compile it again
                    known["saved"][name] = kept = kept_for_backward(contestant, tensors)
                    if name == "fastlora" and case.table != "optimized":
                        check_kept(case, kept)
                step = step_of(case, contestant, tensors, clock)
                step()
                wait_for(device)
                known["errors"][name], steps[name] = digits(worst), step
            except NotHereError as reason:
                known["skipped"][name] = str(reason)
            except Exception as reason:
                wait_for(device)  # if the device is lost, nobody else can run
                known["failures"][name] = describe(reason)
        watch("rounds")
        summary = {}
        if {"frozen", "fastlora"} <= set(steps):
            rounds = Rounds(steps)
            run(rounds)
            summary = rounds.summary()
    return row_of(case, summary, **known)


def row_of(case: Case, summary: dict, **known: dict) -> dict:
    """Plain data for JSON.  Without a summary nothing was timed, and ``failures`` say why."""
    summary = summary or {"rounds": 0, "seconds": {}, "ratios": {}}
    return {
        "id": case.id, "table": case.table, "M": case.M, "K": case.K, "N": list(case.outputs),
        "r": case.r, "dtype": DTYPE_NAMES[case.dtype],
        "adapter_dtype": DTYPE_NAMES[case.adapter_dtype], "dropout": case.dropout,
        **known, **summary, "targets": met_targets(case, summary["ratios"]),
    }  # fmt: skip


def step_of(case: Case, contestant: Contestant, tensors: Tensors, clock: Clock) -> Step:
    """All that is timed of a contestant, one quantity after the other."""
    module, x, leaves = contestant.module, tensors.x, [tensors.x, *contestant.adapter]
    dys = tensors.dys if len(tensors.dys) > 1 else tensors.dys[0]

    def forward() -> object:
        return module(x)

    def inference() -> object:
        with torch.no_grad():
            return module(x)

    def train(mark: Callable[[], Any] = lambda: None) -> list:
        """Forward, backward and the release of what they made, which is part of the price."""
        marks = [mark()]
        ys = module(x)
        marks.append(mark())
        torch.autograd.backward(ys, dys)
        del ys
        for leaf in leaves:
            leaf.grad = None
        return [*marks, mark()]

    def by_parts() -> dict[str, float]:
        clock.start()
        start, middle, end = train(clock.mark)
        return {"forward": clock.seconds(start, middle), "both": clock.seconds(start, end)}

    def in_a_row(calls: int, clock: Clock, **named: Callable[[], object]) -> Step:
        """For a clock that is coarse beside one call."""
        calls = 1 if case.tiny else calls
        return lambda: {name: timed(clock, call, calls) for name, call in named.items()}

    wall = HostClock(x.device)
    if case.table == "overhead":
        own = HostClock(x.device, time.process_time)
        parts = [in_a_row(200, own, forward=forward, inference=inference, both=train)]
    elif case.decodes:
        with contestant.chosen():
            graph = graph_of(inference)
        parts = [in_a_row(1, clock, inference=inference, graph=graph)]
        parts.append(in_a_row(20, wall, wall=inference))
    else:
        parts = [by_parts] + [in_a_row(20, wall, wall=train)] * (case.table == "gpu")

    def step() -> dict[str, float]:
        with contestant.chosen():
            return {name: seconds for part in parts for name, seconds in part().items()}

    return step


def met_targets(case: Case, found: dict) -> list[dict]:
    """Each target that was measured, with its value."""
    targets = []
    for target in case.targets:
        if target.ratio in found.get(target.quantity, ()):
            value = found[target.quantity][target.ratio][1]
            targets.append({**vars(target), "value": value, "met": value <= target.limit})
    return targets


def missed(row: dict) -> list[str]:
    return [
        f"{target['quantity']} {target['ratio']} is {target['value']:.3f}, over {target['limit']:g}"
        for target in row["targets"]
        if not target["met"]
    ]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the pairs."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    pairs *= 1 + (len(pairs) == 1)
    return [digits(each) for each in statistics.quantiles(pairs, n=4, method="inclusive")]


def digits(value: float) -> float:
    """Five significant ones: no time here is known better."""
    return float(f"{value:.5g}")


def describe(error: Exception) -> str:
    """Kind and text, cut where a compiler is verbose, and the place in the sources."""
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error)
    text = text if len(text) <= 1500 else f"{text[:1000]} … {text[-500:]}"
    return f"{type(error).__name__}: {text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


@contextmanager
def threads_for(case: Case) -> Iterator[None]:
    """One thread where the process's CPU time is the caller's, and where nothing is to be gained:

    on a busy machine tiny products would wait for the others' threads.
    """
    before = torch.get_num_threads()
    if case.tiny or case.table == "overhead":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
