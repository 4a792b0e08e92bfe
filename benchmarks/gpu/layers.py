"""Candidates side by side on one case: judged by the oracle first, then timed in shared rounds."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.kernels.launch import Launch, intercept

from ..layers import Contestant
from ..oracle import count_saved
from ..shapes import DTYPE_NAMES, Case
from .candidates import Candidate, Inputs, contest_of, make_inputs
from .cases import DECODE, GRAPHS
from .journal import check_device, describe
from .judge import Judge
from .timing import Clock, Lap, Step, quartiles, whole


@dataclass(frozen=True)
class Entry:
    """A candidate that was found right, on every set of tensors."""

    candidate: Candidate
    contestants: list[Contestant]


@dataclass(frozen=True)
class Effort:
    """How long a case is timed: rounds for ``seconds``, within these limits."""

    seconds: float
    least: int
    most: int


VISIT, DRY = Effort(1.2, 5, 40), Effort(0.0, 1, 1)


def measure(
    case: Case,
    clock: Clock,
    device: torch.device,
    listed: Sequence[Candidate],
    effort: Effort,
    watch: Callable[[str | None], None] = lambda name: None,
) -> dict:
    """One row.  A candidate that is wrong, or raises, has no time, and the reason is in the row.

    ``watch`` hears who runs for the first time, where a broken kernel shows.
    """
    sets = [make_inputs(case, device, seed) for seed in range(_set_count(case, clock))]
    entries, judged, failures, judge = {}, {}, {}, Judge(case)
    for candidate in listed:
        if not candidate.joins(case):
            continue
        watch(candidate.name)
        try:
            with candidate.context():
                entry = Entry(
                    candidate, [candidate.contestant(case, s, case.dropout) for s in sets]
                )
                judged[candidate.name] = judge.judge(candidate, sets[0])
                _step(case, entry.contestants[0], sets[0])(_no_lap)  # as it is timed
                check_device()
            entries[candidate.name] = entry
        except Exception as reason:
            check_device()
            failures[candidate.name] = describe(reason)
    watch(None)
    row = {
        "id": case.id, "table": "gpu-layers", "M": case.M, "K": case.K, "N": list(case.outputs),
        "r": case.r, "dtype": DTYPE_NAMES[case.dtype], "dropout": case.dropout,
        "sets": len(sets), "judged": judged, "failures": failures,
        "seconds": {}, "ratios": {}, "rounds": {},
    }  # fmt: skip
    if "frozen" not in entries:
        return row
    for name, count in (("saved", _saved), ("work", _work)):
        try:
            row[name] = count(case, entries, sets[0])
        except Exception as reason:
            check_device()
            failures[name] = describe(reason)
    late = clock.late
    steps = {
        name: [_step(case, each, s) for each, s in zip(entry.contestants, sets, strict=True)]
        for name, entry in entries.items()
    }
    names = ("inference",) if case.M <= DECODE else ("forward", "both")
    _add_times(row, names, entries, steps, clock, effort)
    row["late"] = clock.late - late
    if case.M <= GRAPHS:
        graphs = _graphs(case, entries, sets, clock, judge, failures)
        _add_times(row, ("graph",), entries, graphs, clock, effort, calls=len(sets))
    return row


def paired_times(
    steps: dict[str, list[Step]],
    clock: Clock,
    effort: Effort,
    entries: dict[str, Entry],
    failures: dict[str, str],
) -> dict[str, list[list[float]]]:
    """The laps of each candidate in each round; no step finds the tensors of the one before it.

    One that raises has no times, and takes no further part.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    start, turn = time.perf_counter(), 0
    for done in range(effort.most + 1):
        for name in list(times):
            own = steps[name]
            try:
                with entries[name].candidate.context():
                    laps = clock.time(own[turn % len(own)])
            except Exception as reason:
                check_device()
                failures[name] = describe(reason)
                del times[name]
                continue
            turn += 1
            if done > 0:  # the first round warms up
                times[name].append(laps)
        if times and len(times) % len(own) == 0:
            turn += 1  # another set for each, next time
        if done >= effort.least and time.perf_counter() - start > effort.seconds:
            break
    return times


def _add_times(row, names, entries, steps, clock, effort, calls: int = 1) -> None:
    times = paired_times(steps, clock, effort, entries, row["failures"])
    if not times.get("frozen"):
        return
    for i, quantity in enumerate(names):
        of = {name: [laps[i] / calls for laps in rounds] for name, rounds in times.items()}
        row["rounds"][quantity] = len(of["frozen"])
        row["seconds"][quantity] = {
            name: float(f"{statistics.median(values):.5g}") for name, values in of.items()
        }
        row["ratios"][quantity] = {
            f"{name}/{base}": quartiles([a / b for a, b in zip(of[name], of[base], strict=True)])
            for base in ("frozen", "merged")
            if base in of
            for name in of
            if name != base
        }


def _step(case: Case, contestant: Contestant, inputs: Inputs) -> Step:
    """Inference, or forward and backward; what they made is freed within the step."""
    leaves = [inputs.x, *contestant.adapter]

    def infer(lap: Lap) -> tuple[Tensor, ...]:
        with torch.no_grad():
            ys = contestant.outputs(inputs.x)
        lap()
        return ys

    def train(lap: Lap) -> tuple[Tensor, ...]:
        ys = contestant.outputs(inputs.x)
        lap()
        gradients = torch.autograd.grad(ys, leaves, inputs.dys)
        lap()
        return (*(y.detach() for y in ys), *gradients)

    return infer if case.M <= DECODE else train


def _no_lap() -> None:
    """For a step that is not timed."""


def _graphs(
    case: Case,
    entries: dict[str, Entry],
    sets: list[Inputs],
    clock: Clock,
    judge: Judge,
    failures: dict[str, str],
) -> dict[str, list[Step]]:
    """One graph of a candidate's steps on all sets of tensors, its first result judged again."""
    graphs = {}
    for name, entry in entries.items():
        try:
            steps = [_step(case, c, s) for c, s in zip(entry.contestants, sets, strict=True)]
            with entry.candidate.context():
                replay = clock.capture([_call(step) for step in steps])
                found = replay()
            if case.dropout == 0.0:  # else the graph has drawn masks that nobody knows
                judge.check(entry.candidate, sets[0], found, 0.0)
            graphs[name] = [whole(replay)]
        except Exception as reason:
            check_device()
            failures[f"{name}, graph"] = describe(reason)
    return graphs


def _call(step: Step) -> Callable[[], object]:
    return lambda: step(_no_lap)


def _saved(case: Case, entries: dict[str, Entry], inputs: Inputs) -> dict:
    """Bytes that wait for the backward: x, and what is added to it."""
    if case.M <= DECODE:
        return {}
    contestants = {name: entry.contestants[0] for name, entry in entries.items()}
    compiled = [name for name, entry in entries.items() if entry.candidate.compiled]
    for name in compiled:  # hooks would make it compile again
        del contestants[name]
    return count_saved(replace(contest_of(case, inputs, case.dropout), contestants=contestants))


def _work(case: Case, entries: dict[str, Entry], inputs: Inputs) -> dict:
    """What the fused candidate's launches state of themselves, in sums up to each lap."""
    if "fused" not in entries:
        return {}
    entry, records = entries["fused"], []

    def note(record: Launch) -> None:
        records.append(record)
        record.run()

    sums: list[dict] = []

    def lap() -> None:
        works = [record.work() for record in records]
        sums.append(
            {
                "launches": len(works),
                "flops": sum(work.flops for work in works),
                "bytes": sum(work.loaded + work.stored for work in works),
            }
        )

    with entry.candidate.context(), intercept(note):
        _step(case, entry.contestants[0], inputs)(lap)
    names = ("inference",) if case.M <= DECODE else ("forward", "both")
    return dict(zip(names, sums, strict=True))


def _set_count(case: Case, clock: Clock) -> int:
    """As many as L2 can't hold, three times over: each step finds its tensors in memory."""
    elements = case.M * case.K + sum(case.outputs) * (case.M + case.K)
    return min(max(2, 1 + math.ceil(3 * clock.l2_bytes / (elements * case.dtype.itemsize))), 8)
