"""What accelerate and torch.compile keep in a process, a test leaves as it was; calls are nodes."""

import pytest
import torch
from accelerate.state import AcceleratorState
from process import Ranks


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the settings of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def nodes_of_few_rows(monkeypatch):
    """Tiny models have few rows, and the node is what is tested; test_few_rows.py has the rest."""
    monkeypatch.setattr("fastlora.ops.dispatch.MOST_ROWS", 0)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A group of two, started when first asked for, and anew after a failure."""
    started: list[Ranks] = []

    def get() -> Ranks:
        if not started or not started[-1].usable:
            started.append(Ranks(2, tmp_path_factory.mktemp("ranks")))
        return started[-1]

    yield get
    for each in started:
        each.close()


@pytest.fixture
def two(ranks) -> Ranks:
    return ranks()
