"""Dropout in the kernels: the torch backend's mask, element by element."""

import pytest
import torch
from kernel_cases import BF16, DEVICE, F32, poisoned

from fastlora.backends.dropout import dropout_mask
from fastlora.kernels import lowrank, project, weight_grad
from fastlora.kernels.lowrank import LowRankConfig
from fastlora.kernels.project import ProjectConfig
from fastlora.kernels.weight_grad import WeightGradConfig

SEEDS = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 1234567890123456789, -987654321987654321]


def mask_of_project(seeds, shape, p, tile, dtype):
    """Each is (keep ∘ 1) I."""
    x, eye = torch.ones(shape, dtype=dtype, device=DEVICE), torch.eye(shape[1], device=DEVICE)
    config = ProjectConfig(*tile, warps=8, stages=2)
    adapters, factors = [eye] * len(seeds), [1.0] * len(seeds)
    return project(x, adapters, factors, precision="ieee", dropout=p, seeds=seeds, config=config)


def mask_of_lowrank(seeds, shape, p, tile, dtype):
    """Each is keep ∘ (1 1); the others of the group are zero."""
    rows, columns = shape
    config, found = LowRankConfig(*tile, warps=8), []
    for i in range(len(seeds)):
        us = [torch.zeros(rows, 1, dtype=dtype, device=DEVICE) for _ in seeds]
        us[i].fill_(1)
        vs = [torch.ones(1, columns, device=DEVICE)] * len(seeds)
        out = poisoned(rows, columns, dtype=dtype)
        lowrank(out, us, vs, precision="ieee", dropout=p, seeds=seeds, config=config)
        found.append(out)
    return found


def mask_of_weight_grad(seeds, shape, p, tile, dtype):
    """Each is (keep ∘ 1)ᵀ I, transposed."""
    v = torch.ones(shape, dtype=dtype, device=DEVICE)
    us = [torch.eye(shape[0], dtype=dtype, device=DEVICE)] * len(seeds)
    outs = [poisoned(*shape) for _ in seeds]
    config, transposed = WeightGradConfig(*tile, warps=8, stages=2), [out.T for out in outs]
    weight_grad(v, us, transposed, precision="ieee", dropout=p, seeds=seeds, config=config)
    return outs


@pytest.fixture(params=[mask_of_project, mask_of_lowrank, mask_of_weight_grad])
def masks_of(request):
    return request.param


def check(masks_of, seeds, shape, p, tile=(32, 32), dtype=F32):
    seeds = torch.as_tensor(seeds, device=DEVICE)
    for seed, mask in zip(seeds, masks_of(seeds, shape, p, tile, dtype), strict=True):
        assert torch.equal(mask, dropout_mask(seed, shape, p).to(mask.dtype))


@pytest.mark.parametrize("shape", [(1, 1), (33, 3), (40, 129)], ids=str)
def test_any_shape(masks_of, shape):
    check(masks_of, [77], shape, 0.3)


@pytest.mark.parametrize("tile", [(16, 64), (64, 16)], ids=str)
def test_any_tile(masks_of, tile):
    check(masks_of, [-5], (70, 101), 0.3, tile)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.05, 0.999999])
def test_any_probability(masks_of, p):
    check(masks_of, [3], (40, 100), p)


def test_any_seed_and_one_for_each_of_a_group(masks_of):
    """In two launches; the seeds may be a part of others."""
    check(masks_of, torch.tensor([5, *SEEDS], device=DEVICE)[1:], (9, 20), 0.5, dtype=BF16)
