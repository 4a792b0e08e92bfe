"""Training steps of a layer, or of a group of them: forward, and forward + backward."""

from time import perf_counter

import pytest
import torch

from .layers import Contest, Contestant, make_contest
from .oracle import check_results, check_saved, count_saved
from .results import make_row
from .rounds import Rounds, Step
from .shapes import Case, all_cases

_BUDGET, _QUICK_BUDGET = 4.0, 0.2  # seconds of rounds


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_layers(case: Case, benchmark, record) -> None:
    contest = make_contest(case)
    errors = check_results(contest)
    saved = count_saved(contest)
    check_saved(contest, saved["fastlora"])
    summary = measure(contest, case, benchmark)
    if summary is not None:
        record(make_row(case, "layers", case.targets, summary, errors=errors, saved=saved))


def measure(contest: Contest, case: Case, benchmark) -> dict | None:
    """The times of all contestants, taken in rounds; None if pytest-benchmark is switched off."""
    rounds = Rounds({name: _step(contest, each) for name, each in contest.contestants.items()})
    rounds.measure(benchmark, _QUICK_BUDGET if case.quick else _BUDGET)
    return None if benchmark.disabled else rounds.summary()


def _step(contest: Contest, contestant: Contestant) -> Step:
    """Forward, backward and the release of what they made, which is part of the price."""
    x, forward = contest.x, contestant.forward
    dys = contest.dys if len(contest.dys) > 1 else contest.dys[0]
    leaves = [x, *contestant.adapter]

    def step() -> dict[str, float]:
        start = perf_counter()
        ys = forward(x)
        middle = perf_counter()
        torch.autograd.backward(ys, dys)
        del ys
        for leaf in leaves:
            leaf.grad = None
        return {"forward": middle - start, "both": perf_counter() - start}

    return step
