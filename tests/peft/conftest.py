"""Resets process-wide state of accelerate after each test; calls are nodes."""

import pytest
from accelerate.state import AcceleratorState


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
