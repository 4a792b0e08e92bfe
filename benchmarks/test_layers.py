"""Training steps of a layer, of a group, of PEFT's own layers; a call's own cost; a GPU's rows."""

import pytest
import torch

from .cases import Case
from .compare import Pair
from .measure import measure


def test_layers(case: Case, pair: Pair | None, rows: list[dict], request) -> None:
    options = request.config.option
    seconds = 0.2 if case.tiny else options.seconds
    if case.table == "host":
        from . import host  # not before: it sets up Triton for a GPU

        row = host.measure(case, seconds)
    elif pair is None:
        row = measure(case, torch.device(options.device), seconds)
    else:
        row = pair.measure(case, seconds)
    rows.append(row)
    if row["failures"]:
        pytest.fail("; ".join(f"{name}: {why}" for name, why in row["failures"].items()), False)
