"""Corrections rebuild a 16-bit weight from what a merge's reverse predicts."""

import pytest
import torch

from fastlora.layers.corrections import corrections

BF16, F16 = torch.bfloat16, torch.float16


def weight_and_delta(dtype, size: float, shape=(301, 333)) -> tuple[torch.Tensor, torch.Tensor]:
    """``size``: of the delta, relative to the weight.  The number of elements isn't even."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(shape)
    return weight.to(dtype), 0.02 * size * torch.randn(shape)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("size", [0.001, 0.03, 0.15, 3.0])
def test_a_weight_is_rebuilt_from_a_prediction_that_differs_slightly(dtype, size):
    weight, delta = weight_and_delta(dtype, size)
    merged = weight + delta.to(dtype)
    made = corrections(weight.flatten(), (merged.float() - delta).flatten())
    rebuilt = made.rebuild((merged.float() - delta * (1 + 1e-7)).flatten())
    assert torch.equal(rebuilt.view(weight.shape), weight)
    limit = 0.35 if size < 1 else 2  # a copy has 2 bytes
    assert sum(tensor.nbytes for tensor in made) <= limit * weight.numel()


def test_signed_zeros_infinities_and_nan_are_rebuilt():
    weight = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-38, 1.0], dtype=BF16)
    predicted = torch.tensor([-0.0, 0.0, torch.nan, 3.0, 1.0, -1e-38, 1.001])
    rebuilt = corrections(weight, predicted).rebuild(predicted)
    assert torch.equal(rebuilt.view(torch.int16), weight.view(torch.int16))


def test_another_prediction_is_an_error():
    weight, delta = weight_and_delta(BF16, 0.1)
    made = corrections(weight.flatten(), (weight.float() + delta).flatten())
    with pytest.raises(RuntimeError, match="can't be rebuilt"):
        made.rebuild((weight.float() - delta).flatten())
