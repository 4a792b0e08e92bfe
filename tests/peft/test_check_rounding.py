"""What check takes for rounding in 16 bits, and what it says of it."""

import math

import pytest
import torch
from peft_models import BATCH, adapted, qwen3

import fastlora
from fastlora.peft.check import Check, Difference


def checked(blocks: int, dtype: torch.dtype, seed: int = 0) -> Check:
    torch.manual_seed(seed)
    model = adapted(qwen3(num_hidden_layers=blocks), target_modules="all-linear").to(dtype)
    return fastlora.check(model.train(), {"input_ids": BATCH, "labels": BATCH})


@pytest.mark.parametrize(
    ("dtype", "of_two"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=["bf16", "f16"]
)
@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_in_16_bits_the_tolerance_grows_with_depth(dtype, of_two, blocks):
    found = checked(blocks, dtype)
    assert found.tolerance == pytest.approx(of_two * math.sqrt(max(1, blocks - 1)))
    assert found, str(found)
    assert "compare in float32 to see them (model.float(), without autocast)" in str(found)


def test_in_float32_it_does_not_and_nothing_is_said():
    found = checked(8, torch.float32)
    assert found.tolerance == 1e-3
    assert "compare" not in str(found)


@pytest.mark.parametrize("seed", range(4))
def test_a_deep_bfloat16_model_is_no_false_alarm(seed):
    """The largest differences of these are 0.12 to 0.42: rounding, in PEFT's run as in this."""
    assert checked(32, torch.bfloat16, seed)


def test_what_is_not_the_same_in_16_bits_says_what_to_do():
    found = checked(1, torch.bfloat16)
    wrong = Check(
        Difference("loss", 0.5),
        found.outputs,
        found.gradients,
        found.layers,
        found.tolerance,
        found.coverage,
        found.dtype,
    )
    assert not wrong
    assert "NOT the same" in str(wrong)
    assert "can do that: compare in float32 before you take it for a defect" in str(wrong)
