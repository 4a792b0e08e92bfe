"""What accelerate and torch.compile keep in a process, a test leaves as it was; calls are nodes."""

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the settings of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def nodes_of_few_rows(monkeypatch):
    """Tiny models have few rows, and the node is what is tested; test_few_rows.py has the rest."""
    monkeypatch.setattr("fastlora.ops.way.MOST_ROWS", 0)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
