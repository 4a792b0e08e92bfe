"""weight_grad with dx's low-rank term in the same pass over x, against two separate kernels."""

import pytest
import torch
from judge import assert_close
from kernel_cases import (
    BF16,
    F16,
    F32,
    LAYOUTS,
    draw_seeds,
    keep_masks,
    launched,
    moved,
    poisoned,
    processors,
    random,
    recorded,
)
from marks import DEVICE, pairwise

from fastlora.kernels import low_rank_pays, lowrank, weight_grad
from fastlora.kernels.config import Call, default_config
from fastlora.kernels.plan import MANY_ROWS
from fastlora.kernels.target import TARGETS, use_target
from fastlora.kernels.weight_grad import WeightGradConfig

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SMALL = WeightGradConfig(16, 32, warps=4, stages=2)


def results(x, us, lora_as, **options):
    """dx and every d lora_a of one pass; memory around them must stay unwritten."""
    m, n = x.shape
    memory = poisoned(m + 4, n, dtype=x.dtype)
    d_lora_as = [poisoned(len(a) + 2, n, dtype=a.dtype) for a in lora_as]
    weight_grad(
        x, us, [each[1:-1].T for each in d_lora_as], precision="ieee",
        vs=[a.T for a in lora_as], low_rank=memory[2:-2], **options,
    )  # fmt: skip
    for each, rows in ((memory, 2), *((each, 1) for each in d_lora_as)):
        assert each[:rows].isnan().all()
        assert each[-rows:].isnan().all()
    return memory[2:-2], [each[1:-1] for each in d_lora_as]


def check(x, us, lora_as, p=0.0, seeds=None, config=None, is_exact=False):
    """Check that dx equals lowrank's, and that every d lora_a is as near to float64 as PyTorch's.

    Bits are compared on a GPU.  On a CPU, a BLAS may sum transposed operands in another order, so
    bits are compared only if sums are exact.
    """
    options = {"dropout": p, "seeds": seeds}
    dx, d_lora_as = results(x, us, lora_as, config=config, **options)
    apart = poisoned(*x.shape, dtype=x.dtype)
    lowrank(apart, us, lora_as, precision="ieee", **options)
    if is_exact or DEVICE != "cpu":
        assert torch.equal(dx, apart)
    torch.testing.assert_close(dx, apart)
    masks = keep_masks(seeds, x.shape, p, len(us))
    for i, (d_lora_a, u, mask) in enumerate(zip(d_lora_as, us, masks, strict=True)):
        kept = torch.where(mask, x, 0)
        truth, size = u.double().T @ kept.double(), u.double().abs().T @ kept.double().abs()
        by_torch = (u.T @ kept).to(d_lora_a.dtype)
        assert_close(f"d lora_a {i}", d_lora_a, truth, by_torch, size, x.dtype)
    return dx, d_lora_as


def case(m, n, ranks, dtype=F32, adapter_dtype=F32, layouts=("contiguous",) * 2):
    """x, every dh and lora_a of one call; ``layouts``: x's and lora_a's."""
    x_layout, a_layout = layouts
    return (
        random(m, n, dtype, x_layout),
        [random(m, r, dtype) for r in ranks],
        [random(r, n, adapter_dtype, a_layout) for r in ranks],
    )


@pairwise(
    {
        "m": [1, 2, 17, 100],
        "n": [1, 17, 33, 100],
        "p": {"plain": 0.0, "masked": 0.4},
        "ranks": {"one": (3,), "group": (3, 20, 16), "rank-64": (64,)},
    }
)
def test_any_shape(m, n, p, ranks):
    check(*case(m, n, ranks), p=p, seeds=draw_seeds(len(ranks)) if p else None)


@pairwise(
    {
        "m,dtype,adapter_dtype": {
            "m65-f32": (65, F32, F32),
            "m96-bf16-f32": (96, BF16, F32),
            "m100-f16": (100, F16, F16),
        },
        "p": {"plain": 0.0, "masked": 0.4},
    }
)
def test_split_over_rows(m, dtype, adapter_dtype, p):
    """Each split computes rows of dx, and leaves a plane of partial sums for d lora_a."""
    operands, seeds = case(m, 40, (3, 4, 1), dtype, adapter_dtype), draw_seeds(3) if p else None
    made = []
    for count in (1, 10**4):
        with processors(count), recorded() as records:
            made.append(check(*operands, p, seeds, SMALL))
        names = [record.name for record in records]
        assert names == ["weight_grad", *["sum_planes"] * (count > 1), "lowrank"]
    (whole, whole_as), (split, split_as) = made
    torch.testing.assert_close(whole, split)
    for one, other in zip(whole_as, split_as, strict=True):
        torch.testing.assert_close(one, other)


def test_a_rank_that_lowrank_cuts_into_steps_has_every_bit_of_sums_that_are_exact():
    """Sums of integers are exact in any order."""
    x, (u,), (lora_a,) = case(20, 24, (70,), BF16)
    check(x.round(), [u.round()], [lora_a.round()], is_exact=True)


@pytest.mark.parametrize("tile", [(64, 16), (16, 128)], ids=str)
def test_any_tile(tile):
    config = WeightGradConfig(*tile, warps=8, stages=2)
    check(*case(70, 90, (50,), BF16, BF16), p=0.3, seeds=draw_seeds(1), config=config)


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", ["contiguous", "window", "column-major"])
def test_any_strides(x_layout, a_layout):
    check(*case(20, 24, (5,), BF16, F32, (x_layout, a_layout)), config=SMALL)


@pytest.mark.parametrize(("count", "p"), [(5, 0.0), (9, 0.4)], ids=["plain", "masked"])
def test_a_group_of_several_launches_adds_to_dx(count, p):
    ranks = [(1, 16, 12, 3)[i % 4] for i in range(count)]
    check(*case(40, 50, ranks, BF16), p=p, seeds=draw_seeds(count) if p else None)


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pairwise(
    {
        "r": [8, 16, 64],
        "count": [1, 2, 3],
        "p": {"plain": 0.0, "masked": 0.1},
        "m,n": {"few": (65, 4096), "narrow": (1000, 1024), "wide": (MANY_ROWS - 1, 14336)},
    }
)
@pytest.mark.parametrize(
    "target", [t for t in TARGETS.values() if t.kind != "cpu"], ids=lambda t: t.name
)
def test_it_is_a_launch_less_than_two_kernels_for_hardly_more_bytes(target, m, n, r, count, p):
    """Compares the bytes of both variants' launches, on meta tensors."""
    x, us = meta(m, n), [meta(m, r) for _ in range(count)]
    lora_as = [meta(r, n, dtype=F32) for _ in range(count)]
    options = {"precision": "ieee", "dropout": p}
    options["seeds"] = meta(count, dtype=torch.int64) if p else None
    outs, vs = ([torch.empty_like(a).T for a in lora_as] for _ in range(2))

    with use_target(target):
        if not low_rank_pays(x, [r] * count, "ieee", p > 0):
            return
    calls = (
        lambda: weight_grad(x, us, outs, vs=vs, low_rank=meta(m, n), **options),
        lambda: weight_grad(x, us, outs, **options),
        lambda: lowrank(meta(m, n), us, lora_as, **options),
    )
    together, pass_over_x, term = (launched(call, target) for call in calls)
    assert len(together) < len(pass_over_x) + len(term)
    assert moved(together) < 1.1 * (moved(pass_over_x) + moved(term))


def test_it_pays_for_few_rows_and_up_to_three_masks_where_a_config_fits():
    def pays(m=512, ranks=(16,), masked=False):
        return low_rank_pays(meta(m, 4096), ranks, "ieee", masked)

    with use_target(TARGETS["sm_90"]):
        assert pays()
        assert pays(ranks=[16] * 5)
        assert pays(ranks=[64] * 3, masked=True)
        assert pays(m=MANY_ROWS - 1)
        assert not pays(m=MANY_ROWS)
        assert not pays(ranks=[16] * 4, masked=True)
        assert not pays(ranks=[512])
    call = Call(512, 4096, 512, 2, "ieee", low_rank=True)
    assert default_config("weight_grad", TARGETS["sm_90"], call) is None
