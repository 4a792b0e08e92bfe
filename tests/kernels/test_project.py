"""project: factor · (keep ∘ x) a for a group, against float64."""

import pytest
import torch
from judge import assert_close
from kernel_cases import BF16, F16, F32, draw_seeds, keep_masks, processors, random, recorded
from marks import pairwise

from fastlora.kernels.project import ProjectConfig, project

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SMALL = ProjectConfig(16, 16, warps=4, stages=2)
FACTORS = (0.75, -1.5, 1.0, 3.0, 0.1, 2.0, 7.0, 0.5, 1.25)


def run(x, adapters, factors, **options):
    return project(x, adapters, factors, precision="ieee", **options)


def check(x, adapters, p=0.0, seeds=None, config=None):
    """Check every product against float64 and return all."""
    factors = FACTORS[: len(adapters)]
    found = run(x, adapters, factors, dropout=p, seeds=seeds, config=config)
    masks = keep_masks(seeds, x.shape, p, len(adapters))
    for value, a, factor, mask in zip(found, adapters, factors, masks, strict=True):
        assert value.is_contiguous()
        kept, a = torch.where(mask, x, 0), a.to(x.dtype)
        truth = factor * (kept.double() @ a.double())
        size = abs(factor) * (kept.double().abs() @ a.double().abs())
        assert_close(f"of rank {a.shape[1]}", value, truth, factor * (kept @ a), size, x.dtype)
    return found


@pairwise({"k": [1, 2, 33, 100], "m": [1, 2, 33]})
def test_any_shape(m, k):
    check(random(m, k), [random(k, 3)])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("count", [2, 5])
def test_a_group_of_any_size_and_ranks(count, dropout):
    adapters = [random(50, (1, 3, 16, 70, 200)[i], F32) for i in range(count)]
    check(random(40, 50, BF16), adapters, dropout, draw_seeds(count) if dropout else None)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("k", [64, 100])
def test_split_over_k(k, dropout):
    """The device decides whether planes are summed afterwards; the numbers agree."""
    x, adapters = random(4, k, BF16), [random(k, 3, F32), random(k, 70, F32)]
    seeds = draw_seeds(2) if dropout else None
    found = []
    for count in (1, 10**4):
        with processors(count), recorded() as records:
            found.append(check(x, adapters, dropout, seeds, SMALL))
        assert len(records) == (1 if count == 1 else 2)
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(whole, split)


@pytest.mark.parametrize(
    "config", [SMALL, ProjectConfig(64, 16, 4, 2), ProjectConfig(16, 64, 4, 2)]
)
def test_any_tile(config):
    check(random(70, 90, BF16), [random(90, 20), random(90, 130)], 0.3, draw_seeds(2), config)


@pytest.mark.parametrize("count", [1, 10**4], ids=["whole", "split"])
def test_the_factor_comes_before_the_rounding(count):
    """x a is 100,000 here, too much for float16."""
    x, a = torch.full_like(random(3, 100, F16), 100.0), torch.full_like(random(100, 2, F16), 10.0)
    with processors(count):
        (product,) = run(x, [a], [1e-3], config=SMALL)
    torch.testing.assert_close(product, torch.full_like(product, 100.0))


def test_nan_in_x_is_not_hidden():
    x = random(20, 40)
    x[3, 7] = torch.nan
    (product,) = run(x, [random(40, 3)], [1.0])
    assert product[3].isnan().all()
    assert product[torch.arange(20, device=x.device) != 3].isfinite().all()
