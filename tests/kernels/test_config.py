"""Configs: what fits, what is chosen, how an axis is cut; and the target they are chosen for."""

from itertools import chain, product

import pytest
import torch

from fastlora.kernels.config import (
    MAX_PROJECTIONS,
    Call,
    GemmConfig,
    ProjectConfig,
    WeightGradConfig,
    block_r,
    chunks,
    splits,
    tiles,
    why_not,
)
from fastlora.kernels.defaults import DEFAULTS, candidates, default_config
from fastlora.kernels.target import TARGETS, target_of, use_target

KERNELS = ["gemm_lowrank", "project", "weight_grad"]
SIZES = [1, 2, 17, 128, 4096, 10**6]
RANKS = [1, 16, 17, 64, 65, 128, 129, 512]
ELEMENTS = [(2, "ieee"), (4, "ieee"), (4, "tf32")]
GROUPS = range(1, MAX_PROJECTIONS + 1)


def calls(target, elements=ELEMENTS, groups=GROUPS, masks=(False, True), **options):
    """Calls as the backend makes them, from tiny to huge."""
    for m, n, r, (itemsize, precision), projections, masked in product(
        SIZES, SIZES, RANKS, elements, groups, masks
    ):
        if precision == "ieee" or target.tf32:
            yield Call(m, n, r, itemsize, precision, projections, masked, **options)


def call(m=4096, n=4096, r=16, itemsize=2, precision="ieee", **options):
    return Call(m, n, r, itemsize, precision, **options)


every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


@every_kernel
@every_target
def test_every_call_has_a_default_that_fits(target, kernel):
    without, adds = set(), (False, True) if kernel == "gemm_lowrank" else (False,)
    for one in chain.from_iterable(calls(target, alone=alone) for alone in adds):
        config = default_config(kernel, target, one)
        if config is None:
            without.add((one.itemsize, one.projections, one.r))
        else:
            assert why_not(config, target, one) == "", one
    assert not without, f"(itemsize, projections, r) without a config: {sorted(without)}"


@every_target
def test_one_pass_over_dy_has_a_default_that_fits_or_none(target):
    found = {}
    for one in calls(target, groups=[1], masks=[False], project=True):
        config = default_config("weight_grad", target, one)
        assert config is None or why_not(config, target, one) == ""
        found[one.r, one.itemsize] = config
    assert found[16, 2] is not None
    assert found[512, 2] is None


@every_kernel
@every_target
def test_candidates_fit_and_hold_the_default_and_its_neighbours(target, kernel):
    for one in (call(), call(r=64, itemsize=4, precision="tf32"), call(m=1, masked=True)):
        default, found = default_config(kernel, target, one), candidates(kernel, target, one)
        assert default in found
        assert len(found) == len(set(found)) > 1
        assert all(why_not(config, target, one) == "" for config in found)
        assert {config.stages for config in found} > {default.stages}


def test_large_tiles_for_large_outputs_and_small_for_few_rows():
    target = TARGETS["sm_90"]
    large, small = (default_config("gemm_lowrank", target, call(m=m)) for m in (8192, 1))
    assert large.block_m * large.block_n > small.block_m * small.block_n
    assert small.block_m == 16


@pytest.mark.parametrize(
    ("config", "name", "one", "reason"),
    [
        (GemmConfig(128, 256, 64, 8, 4), "sm_86", call(), "shared memory"),
        (GemmConfig(128, 128, 64, 8, 3), "gfx942", call(), "shared memory"),
        (ProjectConfig(128, 256, 8, 4), "sm_90", call(), "shared memory"),
        (WeightGradConfig(128, 512, 8, 4), "sm_80", call(), "shared memory"),
        (GemmConfig(128, 256, 32, 4, 2), "sm_80", call(), "a thread"),
        (GemmConfig(128, 256, 32, 8, 2), "sm_80", call(masked=True, projections=2), "a thread"),
        (ProjectConfig(64, 32, 1, 2), "sm_80", call(r=128), "a thread"),
        (WeightGradConfig(16, 256, 4, 2), "sm_80", call(r=128), "a thread"),
        (GemmConfig(128, 256, 32, 8, 2), "sm_100", call(projections=2), "tensor memory"),
        (WeightGradConfig(32, 32, 4, 2), "sm_90", call(r=129, project=True), "rank 129"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_too_big_is_refused_with_the_reason(config, name, one, reason):
    assert reason in why_not(config, TARGETS[name], one)


@pytest.mark.parametrize("projections", GROUPS)
@pytest.mark.parametrize(
    "config", [GemmConfig(32, 32, 16, 4, 2), ProjectConfig(32, 32, 4, 2)], ids=["gemm", "project"]
)
def test_a_step_over_the_rank_is_a_power_of_two_no_longer_than_it_needs(config, projections):
    for r in range(1, 600):
        step = block_r(config, call(r=r, projections=projections))
        assert step & (step - 1) == 0
        assert 16 <= step <= 128
        assert step < 2 * max(r, 16)


@every_kernel
@every_target
def test_splits_cover_the_axis_once_in_whole_steps(target, kernel):
    for one in calls(target, elements=[(2, "ieee")], masks=[False]):
        config = default_config(kernel, target, one)
        for length, step in product((1, 16, 100, 4096, 4097, 10**6), (16, 64, 128)):
            count, each = splits(config, target, one, length, step)
            assert count >= 1
            assert each % step == 0
            assert (count - 1) * each < length <= count * each


def test_splits_fill_the_device_but_no_more():
    target, config = TARGETS["sm_90"], ProjectConfig(64, 64, 4, 4)
    for m in (1, 64, 640, 6400, 64000):
        one = call(m=m)
        count, _ = splits(config, target, one, 10**5, 64)
        assert count * tiles(config, one) <= max(target.processors, tiles(config, one))
    assert splits(config, target, call(m=1), 10**5, 64)[0] > 100


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_chunks_take_every_projection_once(count):
    parts = [list(range(count))[part] for part in chunks(count)]
    assert [i for part in parts for i in part] == list(range(count))
    assert all(1 <= len(part) <= MAX_PROJECTIONS for part in parts)


@every_kernel
@every_target
def test_tables_run_from_large_tiles_to_small(target, kernel):
    rows = DEFAULTS[target.name, kernel]
    for table in rows.values() if isinstance(rows, dict) else [rows]:
        areas = [config.block_m * getattr(config, "block_n", 1) for config in table]
        assert areas == sorted(areas, reverse=True)


def test_no_target_without_memory_to_launch_on_but_a_forced_one():
    meta = torch.device("meta")
    assert target_of(meta) is None
    with use_target(TARGETS["sm_90"]):
        assert target_of(meta) is TARGETS["sm_90"]
