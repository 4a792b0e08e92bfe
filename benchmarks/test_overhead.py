"""The CPU time of one eager call of a layer so small that nothing but the call is left."""

from collections.abc import Callable
from time import process_time

import pytest
import torch

from .layers import Contest, Contestant, make_contest
from .oracle import check_results, check_saved, count_saved
from .results import make_row
from .rounds import Rounds, Step
from .shapes import OVER_PEFT, Case, Target, overhead_cases

_CALLS, _BUDGET = 200, 6.0
_TARGETS = tuple(Target(quantity, OVER_PEFT, 1.0) for quantity in ("forward", "inference", "both"))


@pytest.mark.parametrize("case", overhead_cases(), ids=lambda case: case.id)
@pytest.mark.usefixtures("one_thread")
def test_overhead(case: Case, benchmark, record) -> None:
    contest = make_contest(case)
    errors = check_results(contest)
    saved = count_saved(contest)
    check_saved(contest, saved["fastlora"])
    rounds = Rounds({name: _step(contest, each) for name, each in contest.contestants.items()})
    rounds.measure(benchmark, _BUDGET)
    if not benchmark.disabled:
        record(make_row(case, "overhead", _TARGETS, rounds.summary(), errors=errors, saved=saved))


def _step(contest: Contest, contestant: Contestant) -> Step:
    """Many calls of each kind, for a clock that is coarse beside one of them.

    Every call is in training mode: "inference" is the forward under no_grad, dropout included.
    """
    x, dy, layer = contest.x, contest.dys[0], contestant.module
    leaves = [x, *contestant.adapter]

    def train() -> None:
        layer(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    def step() -> dict[str, float]:
        forward = _cpu_seconds(lambda: layer(x))
        with torch.no_grad():
            inference = _cpu_seconds(lambda: layer(x))
        return {"forward": forward, "inference": inference, "both": _cpu_seconds(train)}

    return step


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = process_time()
    for _ in range(_CALLS):
        call()
    return (process_time() - start) / _CALLS
