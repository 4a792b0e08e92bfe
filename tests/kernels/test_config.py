"""Configs: which ones fit, which are chosen, how an axis is split, and their target."""

from dataclasses import replace
from itertools import chain, product
from math import prod

import pytest
import torch
from kernel_cases import launched
from marks import DEVICE
from torch import Tensor

from benchmarks.forms import Form, Operands
from fastlora.kernels.config import (
    DEFAULTS,
    MAX_PROJECTIONS,
    Call,
    candidates,
    chunks,
    default_config,
    splits,
)
from fastlora.kernels.defaults import PRODUCTS
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.gemm_lowrank_few_rows import gemm_lowrank_few_rows
from fastlora.kernels.project import ProjectConfig
from fastlora.kernels.target import TARGETS
from fastlora.kernels.weight_grad import WeightGradConfig, weight_grad

KERNELS = ["gemm_lowrank", "lowrank", "project", "weight_grad"]
SIZES = [1, 17, 4096, 10**6]
RANKS = [1, 16, 17, 64, 65, 129, 512]
ELEMENTS = [(2, "ieee"), (4, "ieee"), (4, "tf32")]
NVIDIA = ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
GROUPS = range(1, MAX_PROJECTIONS + 1)
TF32 = {"itemsize": 4, "precision": "tf32"}


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


@pytest.mark.parametrize(
    ("kernel", "options"),
    [(kernel, {}) for kernel in KERNELS]
    + [
        ("gemm_lowrank", {"int8": kind, "pointers": pointers})
        for kind in ("int8", "rotated int8")
        for pointers in (False, True)
    ],
    ids=str,
)
@every_target
def test_every_call_has_a_default_that_fits(target, kernel, options):
    without = set()
    for one in calls(target, **options):
        config = default_config(kernel, target, one)
        if config is None:
            without.add((one.itemsize, one.projections, one.r))
        else:
            assert config.why_not(target, one) == "", one
    assert not without, f"(itemsize, projections, r) without a config: {sorted(without)}"


@pytest.mark.parametrize(
    ("over", "options"),
    [("dy", {"groups": [1], "masks": [False], "project": True}), ("x", {"low_rank": True})],
)
@every_target
def test_one_pass_has_a_default_that_fits_or_none(target, over, options):
    found = {}
    for one in calls(target, **options):
        config = default_config("weight_grad", target, one)
        assert config is None or config.why_not(target, one) == ""
        found[one.r, one.itemsize] = config
    assert found[16, 2] is not None
    assert found[512, 2] is None


@every_kernel
@every_target
def test_candidates_fit_and_hold_the_default_and_its_neighbors(target, kernel):
    for one in (call(), call(r=64, itemsize=4, precision="tf32"), call(m=1, masked=True)):
        default, found = default_config(kernel, target, one), candidates(kernel, target, one)
        assert found[0] == default
        if len(found) > 1:  # the next one differs in one field
            pairs = zip(vars(found[1]).values(), vars(default).values(), strict=True)
            assert sum(a != b for a, b in pairs) == 1
        assert len(found) == len(set(found)) >= 1
        assert all(config.why_not(target, one) == "" for config in found)
        if kernel != "lowrank" and target.name != "gfx950":  # it has no pipelines (faults.py)
            assert {config.stages for config in found} > {default.stages}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("projections", GROUPS)
@pytest.mark.parametrize(
    ("kernel", "options", "most"),
    [
        ("gemm_lowrank", {}, 2),
        ("lowrank", {}, 1),
        ("project", {}, 1),
        ("weight_grad", {}, 1),
        ("weight_grad", {"project": True}, 1),
        ("weight_grad", {"low_rank": True}, 1),
    ],
    ids=["base product", "adapter alone", "project", "weight_grad", "over dy", "over x"],
)
@every_target
def test_few_configs_serve_all_numbers_of_rows(target, kernel, options, most, projections, masked):
    """Few, because each config compiles during training."""
    for n in (640, 14336):
        one = call(n=n, projections=projections, masked=masked, **options)
        found = {
            default_config(kernel, target, replace(one, m=m)) for m in (1, 63, 64, 65, 1000, 10**5)
        }
        assert len(found) <= most


@pytest.mark.parametrize(
    ("config", "name", "one", "reason"),
    [
        (GemmConfig(128, 256, 64, 8, 4), "sm_86", call(), "shared memory"),
        (WeightGradConfig(128, 512, 8, 4), "sm_80", call(), "shared memory"),
        (GemmConfig(128, 256, 32, 4, 2), "sm_80", call(), "a thread"),
        (GemmConfig(128, 256, 32, 8, 2), "sm_80", call(masked=True, projections=2), "a thread"),
        (ProjectConfig(64, 32, 1, 2), "sm_80", call(r=128), "a thread"),
        (GemmConfig(128, 256, 32, 8, 2), "sm_100", call(projections=2), "tensor memory"),
        (WeightGradConfig(32, 32, 4, 2), "sm_90", call(r=129, project=True), "rank 129"),
        (WeightGradConfig(32, 512, 8, 3), "sm_90", call(project=True), "races"),
        (WeightGradConfig(32, 64, 4, 2), "sm_90", call(**TF32, project=True), "races"),
        (WeightGradConfig(32, 32, 8, 4, 256), "sm_90", call(r=64, low_rank=True), "races"),
        (WeightGradConfig(32, 32, 4, 3), "sm_90", call(r=33, **TF32, low_rank=True), "races"),
        (GemmConfig(64, 32, 32, 4, 3), "sm_90", call(**TF32, packed="four-bit"), "packed weight"),
        (GemmConfig(64, 64, 64, 4, 2), "gfx950", call(), "miscompiles"),
        # One pass may take few rows where no wgmma reads on: 64 rows, rank 32, masked, float32, one
        # product, mma.sync, tensor memory.
        (WeightGradConfig(64, 32, 8, 3), "sm_90", call(r=64, low_rank=True), ""),
        (WeightGradConfig(32, 32, 8, 4), "sm_90", call(r=32, low_rank=True), ""),
        (WeightGradConfig(32, 32, 8, 4), "sm_90", call(r=64, low_rank=True, masked=True), ""),
        (WeightGradConfig(32, 32, 8, 4), "sm_90", call(r=64, itemsize=4, low_rank=True), ""),
        (WeightGradConfig(32, 32, 8, 4), "sm_90", call(r=64), ""),
        (WeightGradConfig(32, 32, 8, 4), "sm_80", call(r=64, low_rank=True), ""),
        (WeightGradConfig(32, 32, 8, 4), "sm_100", call(r=64, low_rank=True), ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_that_cannot_run_are_refused_with_a_reason(config, name, one, reason):
    found = config.why_not(TARGETS[name], one)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_one_pass_over_x_on_sm_90_fits_groups_of_rank_64(masked):
    one = call(m=512, r=64, projections=3, low_rank=True, masked=masked)
    config = default_config("weight_grad", TARGETS["sm_90"], one)
    assert config.block_m == (32 if masked else 64)


def test_one_byte_too_much_shared_memory_is_refused():
    config, target, one = GemmConfig(64, 64, 32, 4, 2), TARGETS["sm_90"], call()
    size = config.shared_memory(target, one)
    assert config.why_not(replace(target, shared_memory=size), one) == ""
    assert "shared memory" in config.why_not(replace(target, shared_memory=size - 1), one)


GEMM, WEIGHT_GRAD = GemmConfig(16, 16, 16, 4, 2), WeightGradConfig(16, 32, 4, 2)


def thin(*columns: int) -> list[Tensor]:
    return [torch.empty(20, each, device=DEVICE) for each in columns]


# The launch also computes the named result, which is complete only if one step covers the rank.
OF_RANK_200 = {
    "h": lambda x, u, v, config: gemm_lowrank_few_rows(
        *thin(30), x, x.T @ x, v, u, v.T, 1.0, precision="ieee", config=config and GEMM
    ),
    "dh": lambda x, u, v, config: weight_grad(
        x, [u], [v.clone()], precision="ieee", b=v, config=config and WEIGHT_GRAD
    ),
    "dx": lambda x, u, v, config: weight_grad(
        x, [u], [v.clone()], precision="ieee", vs=[v], low_rank=x, config=config and WEIGHT_GRAD
    ),
}


@pytest.mark.parametrize("config", [None, "chosen"])
@pytest.mark.parametrize("made", OF_RANK_200)
def test_a_rank_of_several_steps_is_refused(made, config):
    x, u = thin(30, 200)
    with pytest.raises(ValueError, match="rank 200"):
        OF_RANK_200[made](x, u, x.T @ u, config)


@pytest.mark.parametrize("least", [1, 256])
@pytest.mark.parametrize("programs", [1, 5, 100, 1000])
def test_splits_cover_the_axis_once_in_whole_steps(programs, least):
    for length, step in product((1, 16, 100, 4096, 4097, 10**6), (16, 64, 128)):
        count, steps = splits(132, programs, length, step, least)
        assert count >= 1
        assert (count - 1) * steps * step < length <= count * steps * step


@pytest.mark.parametrize(
    ("least", "count", "steps"), [(1, 8, 2), (128, 8, 2), (250, 4, 4), (5000, 1, 16)]
)
def test_splits_are_as_long_as_their_planes_pay(least, count, steps):
    assert splits(132, 1, 1024, 64, least) == (count, steps)


def first_launch(target, form):
    """The first launch of a form's call, on meta tensors."""
    return launched(lambda: Operands(form, "meta").run(), TARGETS[target])[0]


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    ("name", "ranks", "most"),
    [
        ("h", (16,), 1.5),
        ("h", (64,), 3),
        ("h", (64,) * 3, 4),
        ("dA", (16,), 1.5),
        ("dA", (64,), 3),
        ("dA", (64,) * 3, 4),
        ("dx+", (16,), 2.125),
        ("dx+", (64,), 3.5),
        ("dx+", (64,) * 3, 5.5),
    ],
)
def test_thin_products_ask_little_of_l2_as_their_launchers_state(name, ranks, most, masked, target):
    """In passes over x: the ratio that a config is chosen by, and the bytes its launch states."""
    form = Form(name, 8192, 4096, ranks, dropout=0.1 * masked)
    config = default_config(form.kernel, TARGETS[target], form.call)
    work = first_launch(target, form).work()
    asked = work.loaded_by_tiles + (work.stored if name == "dx+" else 0)
    assert asked / (8192 * 4096 * 2) == pytest.approx(config.through_l2(form.call), rel=0.001)
    assert config.through_l2(form.call) <= most
    if len(ranks) == 1 and ranks != (64,):  # a sum that isn't split is one launch
        assert first_launch(target, form).grid in ((128, 1), (4096,), (8192,))


@pytest.mark.parametrize("name", ["h", "dA"])
def test_masks_of_a_group_keep_two_programs_on_each_processor(name):
    """Except on GeForce, whose memory is slower, and at high ranks, where two don't fit."""
    for target, ranks, p in product(NVIDIA, ((16,) * 3, (64,) * 3, (16,)), (0.0, 0.1)):
        programs = prod(first_launch(target, Form(name, 8192, 4096, ranks, dropout=p)).grid)
        processors = TARGETS[target].processors
        is_two = target in ("sm_80", "sm_90", "sm_100") and p > 0 and ranks == (16,) * 3
        assert not is_two or processors * 1.5 < programs <= processors * 2
        assert is_two or programs <= max(processors, 128)


@pytest.mark.parametrize("table", DEFAULTS.values())
def test_a_config_is_restored_from_its_text(table):
    for config in chain(*table.values()):
        assert type(config).of(str(config)) == config


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_chunks_take_every_projection_once(count):
    parts = list(chunks(list(range(count)), None, torch.arange(count)))
    assert [i for numbers, _, _ in parts for i in numbers] == list(range(count))
    for numbers, absent, tensor in parts:
        assert 1 <= len(numbers) <= MAX_PROJECTIONS
        assert absent is None
        assert tensor.tolist() == numbers


@pytest.mark.parametrize(("target", "kernel"), DEFAULTS, ids=" ".join)
def test_tables_have_every_product_and_run_from_large_tiles_to_small(target, kernel):
    """The usual row of a thin product comes first, the row for calls that race comes last."""
    tables, first = (
        DEFAULTS[target, kernel],
        int(kernel.startswith(("lowrank", "project", "weight"))),
    )
    last = -1 if (target, kernel) == ("sm_90", "one pass over x") else None
    assert tuple(tables) == PRODUCTS
    for table in tables.values():
        areas = [config.block_m * getattr(config, "block_n", 1) for config in table[first:last]]
        assert areas == sorted(areas, reverse=True)
