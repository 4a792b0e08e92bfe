"""Inputs and states that PEFT refuses are refused with the same error."""

import pytest
import torch
from peft_models import inputs, mlp, optimized, other_config, run_both, up


def under_autocast(x):
    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return up(model)(x)

    return call


def without_lora_b(model):
    del up(model).lora_B["default"]
    return up(model)(inputs())


REFUSED = {
    "other-dtype": lambda model: up(model)(inputs().float()),
    "whole-numbers": lambda model: up(model)(torch.ones(2, 8, dtype=torch.long)),
    "other-device": lambda model: up(model)(inputs().to("meta")),
    "features": lambda model: up(model)(inputs()[..., :7]),
    "scalar": lambda model: up(model)(inputs()[0, 0, 0]),
    "no-tensor": lambda model: up(model)([1.0] * 8),
    "none": lambda model: up(model)(None),
    "no-input": lambda model: up(model)(),
    "argument": lambda model: up(model)(inputs(), 1),
    "keyword": lambda model: up(model)(inputs(), scale=1),
    "autocast-whole-numbers": under_autocast(torch.ones(2, 8, dtype=torch.long)),
    "autocast-other-dtype": under_autocast(torch.ones(2, 8)),
    "autocast-complex": under_autocast(torch.ones(2, 8, dtype=torch.complex64)),
    "no-lora_B": without_lora_b,
    "adapter-names-in-training": lambda model: model.train()(inputs(), adapter_names=["a"] * 3),
    "adapter-names-too-few": lambda model: model(inputs(), adapter_names=["default"]),
    "unknown-adapter": lambda model: model.set_adapter("b"),
    "taken-adapter": lambda model: model.add_adapter("default", other_config(use_dora=True)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_peft_refuses_with_the_same_error(name):
    def refuse(model):
        with pytest.raises(Exception) as error:  # noqa: PT011 (which is PEFT's)
            REFUSED[name](model)
        return error.type

    our_error, their_error, _ = run_both(refuse, mlp())
    assert our_error is their_error


def test_the_input_of_a_saved_call_must_not_change_before_backward():
    """As in PEFT's: an error, not a wrong gradient."""
    for model in (theirs := mlp(), optimized(theirs)):
        x = inputs()
        y = up(model)(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
