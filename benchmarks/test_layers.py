"""Training steps of a layer, of a group, of PEFT's own layers; a call's own cost; a GPU's rows."""

import pytest
import torch

from .cases import Case
from .compare import Pair
from .measure import Rounds, measure

_QUICK = 0.2  # seconds of the rounds of a tiny row


def test_layers(case: Case, pair: Pair | None, rows: list[dict], benchmark, request) -> None:
    def run(rounds: Rounds) -> None:
        count = rounds.count(_QUICK if case.tiny else request.config.option.seconds)
        benchmark.pedantic(rounds.run_subject, setup=rounds.run_others, rounds=count)

    if case.table == "host":
        from . import host  # not before: it sets up Triton for a GPU

        row = host.measure(case, run)
    elif case.table == "dequantise":
        from . import dequantise

        if pair is not None:
            pytest.skip("formats are not compared with another commit's")
        row = dequantise.measure(case, run)
    elif pair is None:
        row = measure(case, torch.device(request.config.option.device), run)
    else:
        row = pair.measure(case, run)
    rows.append(row)
    benchmark.extra_info.update(row)
    if row["failures"]:
        pytest.fail("; ".join(f"{name}: {why}" for name, why in row["failures"].items()), False)
