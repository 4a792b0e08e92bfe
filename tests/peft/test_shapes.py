"""Tensors of a layer that don't fit each other: PEFT broadcasts them, or raises its own error."""

import peft
import pytest
import torch
from peft_models import adapted
from torch import Tensor, nn

import fastlora


def part_of(layer: nn.Module, name: str) -> nn.Module:
    if name == "base":
        return layer.base_layer
    return getattr(layer, name)["default"]


A, B, BASE, MAGNITUDE = "lora_A", "lora_B", "base", "lora_magnitude_vector"
DORA, BIAS = {"use_dora": True}, {"lora_bias": True}
CASES = {
    "a-other-in": (A, "weight", (3, 7), {}),
    "a-other-rank": (A, "weight", (2, 8), {}),
    "a-no-rank": (A, "weight", (0, 8), {}),
    "a-vector": (A, "weight", (8,), {}),
    "b-other-out": (B, "weight", (5, 3), {}),
    "b-broadcast": (B, "weight", (1, 3), {}),
    "b-vector": (B, "weight", (3,), {}),
    "b-broadcast-dora": (B, "weight", (1, 3), DORA),
    "base-other-out": (BASE, "weight", (1, 8), {}),
    "base-vector": (BASE, "weight", (8,), {}),
    "bias-broadcast": (BASE, "bias", (1,), {}),
    "bias-broadcast-dora": (BASE, "bias", (1,), DORA),
    "bias-row": (BASE, "bias", (1, 6), {}),
    "bias-other": (BASE, "bias", (5,), {}),
    "lora-bias-broadcast": (B, "bias", (1,), BIAS),
    "lora-bias-other": (B, "bias", (5,), BIAS),
    "magnitude-broadcast": (MAGNITUDE, "weight", (1,), DORA),
    "magnitude-row": (MAGNITUDE, "weight", (1, 6), DORA),
    "magnitude-other": (MAGNITUDE, "weight", (5,), DORA),
}


def outcome(model: nn.Module, x: Tensor):
    """What a call gives: its output, or its error's class and text."""
    torch.manual_seed(0)
    try:
        return model(x).detach()
    except Exception as error:
        return type(error), str(error)


def assert_peft_s(model: peft.PeftModel, x: Tensor) -> None:
    theirs = outcome(model, x)
    fastlora.optimize(model)
    ours = outcome(model, x)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize(("part", "name", "shape", "settings"), CASES.values(), ids=CASES)
def test_a_shape_that_does_not_fit_is_peft_s(part, name, shape, settings):
    model = adapted(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"], r=3, **settings)
    module = part_of(model.base_model.model[0], part)
    setattr(module, name, nn.Parameter(torch.randn(shape)))
    assert_peft_s(model, torch.randn(4, 8))


INPUTS = {
    "too-few": torch.randn(4, 7),
    "one": torch.randn(4, 1),
    "number": torch.tensor(1.0),
    "whole-numbers": torch.ones(4, 8, dtype=torch.long),
    "no-rows": torch.randn(0, 8),
    "a-vector": torch.randn(8),
    "a-list": [1.0] * 8,
    "nothing": None,
}


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("settings", [{}, DORA, BIAS], ids=["lora", "dora", "lora-bias"])
def test_an_input_that_does_not_fit_is_peft_s(settings, x):
    model = adapted(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"], r=3, **settings)
    assert_peft_s(model, x)


def test_the_report_names_the_shape():
    model = adapted(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"], r=3)
    model.base_model.model[0].lora_B["default"].weight = nn.Parameter(torch.randn(1, 3))
    assert "its lora_B has shape (1, 3), not (6, 3)" in str(fastlora.optimize(model))
