"""What only the machine can show of kernels as Triton compiles them; it also runs whole calls.

That is `make machine`.
"""

import json
import shutil
from pathlib import Path

import pytest
from process import run_without_interpreter

WORKER = Path(__file__).parents[1] / "support" / "machine_worker.py"


TARGETS = "sm_80", "sm_90", "sm_100"


@pytest.fixture(scope="module")
def of_targets() -> dict:
    """What the worker prints."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("the machine is built by a C++ compiler, and there is none")
    return json.loads(run_without_interpreter(WORKER, *TARGETS))


@pytest.fixture(params=TARGETS)
def found(request, of_targets) -> dict:
    """What it prints of a target, by the name of its functions."""
    return of_targets[request.param]


def test_a_result_may_lie_where_its_operand_does_and_beside_it_would_be_a_race(found):
    """The thread that loads an element is the only one that does, and stores it."""
    races = found["races"]
    assert races["dy"] == races["add"] == []
    assert races["one element further"] == races["a vector further"] == ["global race"]


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        ("nothing", ""),
        ("a grid", "other results"),
        ("an address", "outside of every tensor"),
        ("a buffer", "outside of every tensor"),
    ],
)
def test_a_kept_call_runs_as_its_replay_hands_it_over(spoiled, said, found):
    answer = found["replays"][spoiled]
    assert said in answer if said else answer == ""
