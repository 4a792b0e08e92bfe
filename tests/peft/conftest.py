"""Resets process-wide state of accelerate and torch.compile after each test; calls are nodes."""

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
    """Tiny models have few rows, so use the node for few rows also (except test_few_rows.py)."""
    monkeypatch.setattr("fastlora.ops.few_rows.MOST_ROWS", 0)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A function that returns a group of processes, and starts a new one if necessary."""
    started: dict[int, Ranks] = {}

    def get(size: int = 2) -> Ranks:
        if size not in started or not started[size].usable:
            started[size] = Ranks(size, tmp_path_factory.mktemp("ranks"))
        return started[size]

    yield get
    for each in started.values():
        each.close()


@pytest.fixture
def two(ranks) -> Ranks:
    return ranks()
