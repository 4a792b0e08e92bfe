"""Training steps of PEFT's layers, as they are and optimised: forward, and forward + backward."""

import pytest

from .optimized import PeftCase, check_results, make_contest, peft_cases
from .oracle import count_saved
from .results import make_row
from .test_layers import measure


@pytest.mark.parametrize("case", peft_cases(), ids=lambda case: case.id)
def test_optimized(case: PeftCase, benchmark, record) -> None:
    contest = make_contest(case)
    errors = check_results(contest)
    saved = count_saved(contest)
    summary = measure(contest, case, benchmark)
    if summary is not None:
        record(make_row(case, "optimized", case.targets, summary, errors=errors, saved=saved))
