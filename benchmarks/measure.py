"""One row: the contestants of a case, judged first, then timed in shared rounds.

An absolute time says nothing on a shared machine, so every time is a ratio, taken in pairs: a
round runs all contestants in turn and gives one ratio of each two; reported are the quartiles.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .cases import DTYPE_NAMES, Case
from .clock import Clock, clock_for, graph_of, wait_for
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

    def count(self, seconds: float, least: int = _LEAST) -> int:
        """How many rounds fit, after a warm-up."""
        for _ in range(2):
            start = time.perf_counter()
            for step in self.steps.values():
                step()
            round_seconds = 2 * (time.perf_counter() - start)
        return min(max(int(seconds / round_seconds), least), _MOST)

    def summary(self) -> dict:
        """Median seconds of each contestant; quartiles of the ratios of each two that matter."""
        quantities = self.times[self.subject][0]
        return {
            "rounds": len(self.times[self.subject]),
            "seconds": {
                quantity: {
                    name: digits(statistics.median(self._of(name, quantity))) for name in self.times
                }
                for quantity in quantities
            },
            "ratios": {
                quantity: {
                    f"{above}/{below}": self._ratio(above, below, quantity)
                    for below in self.times
                    for above in self.times
                    if above != below and (below == "frozen" or above == self.subject)
                }
                for quantity in quantities
            },
        }

    def _of(self, name: str, quantity: str) -> list[float]:
        return [times[quantity] for times in self.times[name]]

    def _ratio(self, above: str, below: str, quantity: str) -> list[float]:
        return ratios(self._of(above, quantity), self._of(below, quantity))


@dataclass
class Entrants:
    """The contestants that were found right, and what is known of all."""

    steps: dict[str, Step] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    saved: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def measure(
    case: Case,
    device: torch.device,
    run: Callable[[Rounds], None],
    makers: dict[str, Maker] | None = None,
    watch: Callable[[str], None] = lambda name: None,
    without: Collection[str] = (),
) -> dict:
    """A row.  ``run`` runs the rounds; ``watch`` hears who is tried next.

    A contestant that is wrong, keeps too much or raises has no time; the reason is in ``failures``.
    """
    makers = makers or makers_for(case)
    makers = {name: make for name, make in makers.items() if name not in without}
    tensors, clock = make_tensors(case, device), clock_for(device)
    with threads_for(case):
        found = enter(case, tensors, clock, makers, watch)
        summary = {}
        if {"frozen", "fastlora"} <= set(found.steps):
            rounds = Rounds(found.steps)
            run(rounds)
            summary = rounds.summary()
    known = {key: value for key, value in vars(found).items() if key != "steps"}
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


def enter(
    case: Case,
    tensors: Tensors,
    clock: Clock,
    makers: dict[str, Maker],
    watch: Callable[[str], None],
) -> Entrants:
    """Judge everybody, and run one step of who is right."""
    judge, found = Judge(case, tensors), Entrants()
    trains = not case.decodes
    for name, make in makers.items():
        watch(name)
        try:
            worst = judge.error(name, make, backward=trains)
            contestant = make(case, tensors, case.dropout)
            with contestant.chosen():
                if trains and not name.startswith("compiled"):  # hooks would compile it again
                    found.saved[name] = kept_for_backward(contestant, tensors)
                if name == "fastlora" and trains and case.table != "optimized":
                    check_kept(case, found.saved[name])
                step = step_of(case, contestant, tensors, clock)
                step()
            wait_for(tensors.x.device)
            found.errors[name] = digits(worst)
            found.steps[name] = step
        except NotHereError as reason:
            found.skipped[name] = str(reason)
        except Exception as reason:
            wait_for(tensors.x.device)  # if the device is lost, nobody else can run
            found.failures[name] = describe(reason)
    watch("rounds")
    return found


def step_of(case: Case, contestant: Contestant, tensors: Tensors, clock: Clock) -> Step:
    """All that is timed of a contestant, one part after the other."""
    module, x, leaves = contestant.module, tensors.x, [tensors.x, *contestant.adapter]
    dys = tensors.dys if len(tensors.dys) > 1 else tensors.dys[0]

    def infer() -> object:
        with torch.no_grad():
            return module(x)

    def train(mark: Callable[[], object] = lambda: None) -> list:
        """Forward, backward and the release of what they made, which is part of the price."""
        marks = [mark()]
        ys = module(x)
        marks.append(mark())
        torch.autograd.backward(ys, dys)
        del ys
        for leaf in leaves:
            leaf.grad = None
        return [*marks, mark()]

    def train_by_parts() -> dict[str, float]:
        clock.start()
        start, middle, end = train(clock.mark)
        return {"forward": clock.seconds(start, middle), "both": clock.seconds(start, end)}

    def once(call: Callable[[], object], quantity: str) -> Step:
        def step() -> dict[str, float]:
            clock.start()
            start = clock.mark()
            call()
            return {quantity: clock.seconds(start, clock.mark())}

        return step

    def many(call: Callable[[], object], quantity: str, read: Callable[[], float]) -> Step:
        def step() -> dict[str, float]:
            wait_for(x.device)
            start = read()
            for _ in range(calls_in_a_row):
                call()
            wait_for(x.device)
            return {quantity: (read() - start) / calls_in_a_row}

        return step

    # In a row, for a clock that is coarse beside one of them.
    calls_in_a_row = 1 if case.tiny else 200 if case.table == "overhead" else 20
    parts = [train_by_parts]
    if case.table == "overhead":  # the caller's own work
        calls = {"forward": lambda: module(x), "inference": infer, "both": train}
        parts = [many(call, name, time.process_time) for name, call in calls.items()]
    elif case.decodes:
        parts = [once(infer, "inference"), once(graph_of(infer), "graph")]
        parts.append(many(infer, "wall", time.perf_counter))
    elif case.table == "gpu":  # what a caller waits for, where the host is slower than the device
        parts.append(many(train, "wall", time.perf_counter))

    def step() -> dict[str, float]:
        with contestant.chosen():
            return {name: seconds for part in parts for name, seconds in part().items()}

    return step


def met_targets(case: Case, found: dict) -> list[dict]:
    """Each target that was measured, with its value."""
    return [
        {
            "quantity": target.quantity, "ratio": target.ratio, "limit": target.limit,
            "value": found[target.quantity][target.ratio][1],
            "met": found[target.quantity][target.ratio][1] <= target.limit,
        }
        for target in case.targets
        if target.ratio in found.get(target.quantity, ())
    ]  # fmt: skip


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
