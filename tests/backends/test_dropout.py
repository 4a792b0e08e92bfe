"""The dropout mask: its mean, its independence in every direction, and its seed."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlora.backends.dropout import DropoutMask
from fastlora.backends.torch import dropout_mask


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor([number])


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """The correlation, in standard deviations of the correlation of two independent masks."""
    first, second = (mask.double() - mask.double().mean() for mask in (first, second))
    share = (first * second).mean() / (first.std() * second.std())
    return share.item() * math.sqrt(first.numel())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("number", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 1234567890123])
def test_mean_and_variance(p, number):
    mask = dropout_mask(seed_of(number), (512, 1024), p).double()
    sigma = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(mask.mean().item() - (1 - p)) < 4.5 * sigma
    # The means of rows and columns vary as much as means of independent draws: the ratio of
    # variances is 1 up to its own standard error.
    for means, count in ((mask.mean(1), 1024), (mask.mean(0), 512)):
        ratio = means.var().item() / (p * (1 - p) / count)
        assert abs(ratio - 1) < 5 * math.sqrt(2 / len(means))


@pytest.mark.parametrize("number", [0, 7, 2**40 + 3])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(0, 1), (0, 2), (0, 3), (0, 64), (1, 0), (2, 0), (64, 0), (1, 1), (1, 2), (3, 5)],
)
def test_no_correlation_between_neighbors(rows, columns, number):
    mask = dropout_mask(seed_of(number), (1024, 1024), 0.5)
    near = mask[: 1024 - rows, : 1024 - columns]
    assert abs(correlation(near, mask[rows:, columns:])) < 4.5


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("number", [0, 1, 2**35 + 1, 123456789012345])
def test_no_two_rows_and_no_two_columns_are_alike(number, p):
    """For all pairs, correlations vary like independent draws', and none is an outlier."""
    mask = dropout_mask(seed_of(number), (1024, 1024), p).float()
    mask = (mask - (1 - p)) / math.sqrt(p - p * p)
    for each in (mask, mask.T):
        pairs = (each @ each.T / math.sqrt(1024))[torch.triu(torch.ones(1024, 1024), 1).bool()]
        assert abs(pairs.square().mean().item() - 1) < 0.02
        assert pairs.abs().max().item() < 8
        assert abs(pairs.mean().item()) < 4.5 / math.sqrt(pairs.numel())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_same_places_are_independent_from_mask_to_mask(p):
    """Elements, pairs and rectangles' corners have no bias over many seeds."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (2000,))
    masks = torch.stack([dropout_mask(seed, (6, 40), p) for seed in seeds]).double()
    masks = (masks - (1 - p)) / math.sqrt(p - p * p)
    pairs = masks[:, :, :-1] * masks[:, :, 1:]
    corners = torch.cat([pairs[:, :-1] * pairs[:, 1:], pairs[:, :-2] * pairs[:, 2:]], 1)
    wide = masks[:, :, :20] * masks[:, :, 20:]
    more = wide[:, :-1] * wide[:, 1:]
    for each in (masks, pairs, masks[:, :-1] * masks[:, 1:], corners, more):
        scores = each.mean(0) * math.sqrt(len(seeds))
        count = scores.numel()
        assert abs(scores.square().mean().item() - 1) < 6 * math.sqrt(2 / count) + 0.1


def test_every_p_is_kept_alike():
    """A chi-square test of the words' upper six bits, which the masks of 64 different p reveal."""
    seed, shape = seed_of(3), (512, 2048)
    kept = torch.tensor([dropout_mask(seed, shape, i / 64).sum() for i in range(1, 64)]).double()
    counts = -torch.diff(kept)
    expected = shape[0] * shape[1] / 64
    chi = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi - 62) < 5 * math.sqrt(2 * 62)


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1.0), (2**-20, 1.0), (1 - 2**-20, 2**-16)])
def test_ends_of_the_range(p, kept):
    mask = dropout_mask(seed_of(1), (256, 4096), p).double()
    assert mask.mean().item() == pytest.approx(kept, abs=4.5 * 2**-18)


@pytest.mark.parametrize("columns", [1, 2, 7, 8])
def test_the_same_however_rows_are_cut(columns):
    whole = dropout_mask(seed_of(9), (20, columns), 0.3)
    mask = DropoutMask(seed_of(9), (20, columns), 0.3)
    parts = [mask.rows(first, count) for first, count in ((0, 1), (1, 6), (7, 13))]
    assert torch.equal(torch.cat(parts).bool(), whole)
    assert torch.equal(dropout_mask(seed_of(9), (5, columns), 0.3), whole[:5])


@pytest.mark.parametrize("columns", [1, 511, 4096])
@pytest.mark.parametrize("number", [0, -1, 2**31, 2**63 - 1, -(2**63), 1234567890123])
def test_numpy_s_masks_are_torch_s(number, columns):
    """A dispatch mode must see torch operations; without a mode, numpy computes a few rows."""
    shape = (7, columns)
    made = dropout_mask(seed_of(number), shape, 0.3)
    with FlopCounterMode(display=False):
        assert torch.equal(dropout_mask(seed_of(number), shape, 0.3), made)
    # computed by all threads
    many = DropoutMask(seed_of(number), (4096, columns), 0.3).rows(0, 4096)
    assert torch.equal(many[:7], made)


@pytest.mark.parametrize("p", [0.0, 2**-17, 0.3, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_drop_is_the_mask(dtype, p):
    """From any row on, with strides, into another tensor and in place; dropped elements are +0."""
    mask, x = DropoutMask(seed_of(4), (70, 33), p), torch.randn(20, 40).to(dtype)[:, :33]
    x[::3], x[1::3] = float("nan"), -float("inf")
    other, out = x.clone(), torch.empty_like(x)
    mask.drop(50, (x, out), (other, other))
    kept = dropout_mask(seed_of(4), (70, 33), p)[50:]
    expected = torch.where(kept, x, torch.zeros_like(x))
    for found in (out, other):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert not found[~kept].signbit().any()
