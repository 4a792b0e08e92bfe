"""The oracles themselves, compared with loops over single elements."""

import oracles
import pytest
import torch

from fastlora import reference


def test_formula_number_by_number():
    x, weight, lora_a, lora_b, bias = (
        torch.randn(shape, dtype=torch.float64) for shape in ((3, 5), (4, 5), (2, 5), (4, 2), (4,))
    )
    mask = torch.rand(3, 5) > 0.3
    options = {"scale": 0.7, "dropout": 0.3, "mask": mask}
    y = reference.lora_linear(x, weight, lora_a, lora_b, bias=bias, **options)
    for m in range(3):
        for n in range(4):
            base = sum(x[m, k] * weight[n, k] for k in range(5)) + bias[n]
            update = sum(
                float(mask[m, k]) * x[m, k] / 0.7 * lora_a[i, k] * lora_b[n, i]
                for k in range(5)
                for i in range(2)
            )
            torch.testing.assert_close(y[m, n], base + 0.7 * update)


def test_experts_number_by_number():
    """The second expert has no rows, and the last row belongs to no expert."""
    shapes = ((6, 5), (3, 4, 5), (3, 2, 5), (3, 4, 2), (3, 4))
    x, weight, lora_a, lora_b, bias = (torch.randn(s, dtype=torch.float64) for s in shapes)
    mask = torch.rand(6, 5) > 0.3
    options = {"bias": bias, "scale": 0.7, "dropout": 0.3, "mask": mask}
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    y = oracles.grouped_lora_linear(x, weight, lora_a, lora_b, offsets, **options)
    for m, e in enumerate([0, 0, 2, 2, 2]):
        for n in range(4):
            base = sum(x[m, k] * weight[e, n, k] for k in range(5)) + bias[e, n]
            update = sum(
                float(mask[m, k]) * x[m, k] / 0.7 * lora_a[e, i, k] * lora_b[e, n, i]
                for k in range(5)
                for i in range(2)
            )
            torch.testing.assert_close(y[m, n], base + 0.7 * update)
    assert not y[5].any()


def test_dropout_without_a_mask_is_an_error():
    for call, shapes, ends in (
        (reference.lora_linear, ((2, 5), (4, 5), (2, 5), (4, 2)), []),
        (oracles.grouped_lora_linear, ((6, 5), (3, 4, 5), (3, 2, 5), (3, 4, 2)), [[2, 2, 5]]),
    ):
        with pytest.raises(ValueError, match="no mask"):
            call(*map(torch.randn, shapes), *ends, dropout=0.1)
