"""Dropout in the kernels: the torch backend's mask, element by element, for any seed and p.

The tests of each kernel check that its numbers use this mask, for tiles of any size.
"""

import pytest
import torch
from kernel_cases import BF16, DEVICE, F32, draw_seeds, keep_masks, poisoned, random

from fastlora.backends.dropout import dropout_mask
from fastlora.kernels.project import ProjectConfig, project
from fastlora.kernels.weight_grad import weight_grad

SEEDS = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 1234567890123456789, -987654321987654321]


def check(seeds, shape, p, dtype=F32):
    """Check the mask by computing (keep ∘ 1) I."""
    x, eye = torch.ones(shape, dtype=dtype, device=DEVICE), torch.eye(shape[1], device=DEVICE)
    config, count = ProjectConfig(32, 32, warps=8, stages=2), len(seeds)
    options = {"precision": "ieee", "dropout": p, "seeds": seeds, "config": config}
    masks = project(x, [eye] * count, [1.0] * count, **options)
    for seed, mask in zip(seeds, masks, strict=True):
        assert torch.equal(mask, dropout_mask(seed, shape, p).to(mask.dtype))


@pytest.mark.parametrize("shape", [(1, 1), (33, 3), (40, 129)], ids=str)
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.05, 0.3, 0.999999])
def test_any_probability_and_shape(shape, p):
    check(torch.tensor([3], device=DEVICE), shape, p)


def test_any_seed_and_one_for_each_of_a_group():
    """The group takes two launches, and the seeds are a view of a larger tensor."""
    check(torch.tensor([5, *SEEDS], device=DEVICE)[1:], (9, 20), 0.5, BF16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kernel", ["project", "weight_grad", "one pass over x"])
def test_dropped_infinities_and_nan_have_no_effect(kernel, value):
    """Dropped elements of x; gemm_lowrank and lowrank drop elements of their product instead."""
    x, seeds = random(40, 20), draw_seeds(1)
    (mask,) = keep_masks(seeds, x.shape, 0.5, 1)
    clean = torch.where(mask, x, 0.0)
    x[~mask] = value
    options = {"precision": "ieee", "dropout": 0.5, "seeds": seeds}
    if kernel == "project":
        a = random(20, 3)
        (found,), expected = project(x, [a], [1.0], **options), clean @ a
    else:
        u, found = random(40, 3), poisoned(20, 3)
        if kernel == "one pass over x":
            options |= {"vs": [random(20, 3)], "low_rank": poisoned(40, 20)}
        weight_grad(x, [u], [found], **options)
        expected = clean.T @ u
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
