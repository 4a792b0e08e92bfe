"""Measures each row of the tables: a training step, a call with few rows, or a GPU's call."""

import pytest
import torch

from .cases import Case
from .compare import Pair
from .measure import measure


def test_layers(case: Case, pair: Pair | None, rows: list[dict], benchmark, request) -> None:
    options = request.config.option
    seconds = 0.2 if case.tiny else options.seconds

    def run() -> dict:
        if case.table == "host":
            from . import host  # imported late, because it sets up Triton for a GPU

            return host.measure(case, seconds)
        if pair is None:
            return measure(case, torch.device(options.device), seconds)
        return pair.measure(case, seconds)

    # measure() runs the rounds itself; --benchmark-json has the row as extra_info.
    row = benchmark.pedantic(run, rounds=1)
    rows.append(row)
    benchmark.extra_info.update(row)
    if row["failures"]:
        pytest.fail("; ".join(f"{name}: {why}" for name, why in row["failures"].items()), False)
