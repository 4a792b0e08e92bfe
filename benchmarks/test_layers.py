"""Training steps of a layer, of a group, of blocks, of PEFT's own layers; a GPU's rows."""

import pytest
import torch

from .cases import Case
from .measure import measure


def test_layers(case: Case, rows: list[dict], request) -> None:
    options = request.config.option
    seconds = 0.2 if case.tiny else options.seconds
    if case.table == "host":
        from . import host  # not before: it sets up Triton for a GPU

        row = host.measure(case, seconds)
    else:
        row = measure(case, torch.device(options.device), seconds)
    rows.append(row)
    if row["failures"]:
        pytest.fail("; ".join(f"{name}: {why}" for name, why in row["failures"].items()), False)
