"""weight_grad: (keep ∘ v)ᵀ u for a group, and in the same pass v b or dx's low-rank term."""

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

from fastlora.kernels.config import Call, default_config
from fastlora.kernels.lowrank import lowrank
from fastlora.kernels.plan import MANY_ROWS, low_rank_pays
from fastlora.kernels.project import project
from fastlora.kernels.target import TARGETS, use_target
from fastlora.kernels.weight_grad import WeightGradConfig, one_pass_pays, weight_grad

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SMALL = WeightGradConfig(16, 32, warps=4, stages=2)
every_gpu = pytest.mark.parametrize(
    "target", [t for t in TARGETS.values() if t.kind != "cpu"], ids=lambda t: t.name
)


def outputs(n, ranks, dtype, orientation):
    """NaN tensors inside of larger NaN tensors, in the layout of d lora_b [n, r] or d lora_a.T."""
    outs = []
    for r in ranks:
        memory = poisoned(n * r + 20, dtype=dtype)[10:-10]
        outs.append(memory.view(n, r) if orientation == "d_lora_b" else memory.view(r, n).T)
    return outs


def check(v, us, dtype=F32, orientation="d_lora_a", p=0.0, seeds=None, config=None):
    """Check every product against float64 and return all; memory around them must stay NaN."""
    outs = outputs(v.shape[1], [u.shape[1] for u in us], dtype, orientation)
    weight_grad(v, us, outs, precision="ieee", dropout=p, seeds=seeds, config=config)
    assert_products(outs, v, us, p, seeds)
    return outs


def assert_products(outs, v, us, p, seeds):
    n, masks = v.shape[1], keep_masks(seeds, v.shape, p, len(us))
    for i, (out, u, mask) in enumerate(zip(outs, us, masks, strict=True)):
        kept = torch.where(mask, v, 0)
        truth, size = kept.double().T @ u.double(), kept.double().abs().T @ u.double().abs()
        assert_close(f"product {i}", out, truth, (kept.T @ u).to(out.dtype), size, v.dtype)
        around = torch.as_strided(out, (n * u.shape[1] + 20,), (1,), out.storage_offset() - 10)
        assert around[:10].isnan().all()
        assert around[-10:].isnan().all()


def check_with_low_rank(x, us, lora_as, p=0.0, seeds=None, config=None, is_exact=False):
    """Check the products, and that dx equals lowrank's; memory around them must stay NaN.

    Bits are compared on a GPU.  On a CPU, a BLAS may sum transposed operands in another order, so
    bits are compared only if sums are exact.
    """
    (m, n), vs = x.shape, [a.T for a in lora_as]
    options = {"precision": "ieee", "dropout": p, "seeds": seeds}
    memory, apart = (poisoned(rows, n, dtype=x.dtype) for rows in (m + 4, m))
    outs, dx = outputs(n, [len(a) for a in lora_as], lora_as[0].dtype, "d_lora_a"), memory[2:-2]
    weight_grad(x, us, outs, vs=vs, low_rank=dx, config=config, **options)
    assert memory[:2].isnan().all()
    assert memory[-2:].isnan().all()
    lowrank(apart, us, lora_as, **options)
    if is_exact or DEVICE != "cpu":
        assert torch.equal(dx, apart)
    torch.testing.assert_close(dx, apart)
    assert_products(outs, x, us, p, seeds)
    return [dx, *outs]


def case(m, n, ranks, dtype=F32, adapter_dtype=F32, layouts=("contiguous",) * 2):
    """x, every dh and lora_a of one call; ``layouts``: x's and lora_a's."""
    x_layout, a_layout = layouts
    return (
        random(m, n, dtype, x_layout),
        [random(m, r, dtype) for r in ranks],
        [random(r, n, adapter_dtype, a_layout) for r in ranks],
    )


@pairwise({"m": [1, 2, 17, 100], "n": [1, 17, 33, 100], "orientation": ["d_lora_a", "d_lora_b"]})
def test_any_shape(m, n, orientation):
    check(random(m, n), [random(m, 3)], orientation=orientation)


@pairwise(
    {
        "m": [1, 2, 17, 100],
        "n": [1, 17, 33, 100],
        "p": {"plain": 0.0, "masked": 0.4},
        "ranks": {"one": (3,), "group": (3, 20, 16), "rank-64": (64,)},
    }
)
def test_any_shape_with_low_rank(m, n, p, ranks):
    check_with_low_rank(*case(m, n, ranks), p, draw_seeds(len(ranks)) if p else None)


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
def test_split_over_rows_with_low_rank(m, dtype, adapter_dtype, p):
    """Each split computes rows of dx, and leaves a plane of partial sums for d lora_a."""
    operands, seeds = case(m, 40, (3, 4, 1), dtype, adapter_dtype), draw_seeds(3) if p else None
    made = []
    for count in (1, 10**4):
        with processors(count), recorded() as records:
            made.append(check_with_low_rank(*operands, p, seeds, SMALL))
        names = [record.name for record in records]
        assert names == ["weight_grad", *["sum_planes"] * (count > 1), "lowrank"]
    for whole, split in zip(*made, strict=True):
        torch.testing.assert_close(whole, split)


@pytest.mark.parametrize("tile", [(64, 16), (16, 128)], ids=str)
def test_any_tile(tile):
    config, seeds = WeightGradConfig(*tile, warps=8, stages=2), draw_seeds(1)
    check(random(70, 90, BF16), [random(70, 130, BF16)], p=0.3, seeds=seeds, config=config)
    check_with_low_rank(*case(70, 90, (50,), BF16, BF16), 0.3, seeds, config)


def test_a_rank_that_lowrank_cuts_into_steps_has_every_bit_of_sums_that_are_exact():
    """Sums of integers are exact in any order."""
    x, (u,), (lora_a,) = case(20, 24, (70,), BF16)
    check_with_low_rank(x.round(), [u.round()], [lora_a.round()], is_exact=True)


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", ["contiguous", "window", "column-major"])
def test_any_strides(x_layout, a_layout):
    check_with_low_rank(*case(20, 24, (5,), BF16, F32, (x_layout, a_layout)), config=SMALL)


@pytest.mark.parametrize(("count", "p"), [(5, 0.0), (9, 0.4)], ids=["plain", "masked"])
def test_a_group_of_several_launches_adds_to_dx(count, p):
    ranks = [(1, 16, 12, 3)[i % 4] for i in range(count)]
    check_with_low_rank(*case(40, 50, ranks, BF16), p, draw_seeds(count) if p else None)


one_pass = pairwise(
    {
        "dtype,adapter_dtype": {"f32": (F32, F32), "bf16-f32": (BF16, F32), "f16": (F16, F16)},
        "r": [1, 5, 70],
        "n": {"one-tile-of-columns": 20, "several": 100},
        "processor_count": {"whole": 1, "split": 10**4},
    }
)


def in_one_pass(dy, h, b, factor, processor_count):
    """d lora_b and dh of one launch."""
    (d_b,) = outputs(dy.shape[1], [h.shape[1]], b.dtype, "d_lora_b")
    with processors(processor_count):
        dh = weight_grad(dy, [h], [d_b], precision="ieee", b=b, factor=factor, config=SMALL)
    return d_b, dh


@one_pass
def test_one_pass_is_as_two_calls(dtype, adapter_dtype, r, n, processor_count):
    """Equal up to rounding, because a BLAS sums the transposed operands in another order."""
    dy, h, b = random(100, n, dtype), random(100, r, dtype), random(n, r, adapter_dtype)
    d_b, dh = in_one_pass(dy, h, b, -0.3, processor_count)
    with processors(processor_count):
        (apart,) = check(dy, [h], adapter_dtype, "d_lora_b", config=SMALL)
    truth, size = dy.double().T @ h.double(), dy.double().abs().T @ h.double().abs()
    assert_close("d lora_b", d_b, truth, apart, size, dtype)
    truth = -0.3 * dy.double() @ b.to(dtype).double()
    size = 0.3 * dy.double().abs() @ b.double().abs()
    assert_close("dh", dh, truth, project(dy, [b], [-0.3], precision="ieee")[0], size, dtype)


@one_pass
def test_one_pass_has_every_bit_of_sums_that_are_exact(dtype, adapter_dtype, r, n, processor_count):
    """Sums of integers are exact in any order; only dh is rounded, once."""
    dy, h, b = (
        torch.randint(-3, 4, shape, device=DEVICE).to(its_dtype)
        for shape, its_dtype in (((100, n), dtype), ((100, r), dtype), ((n, r), adapter_dtype))
    )
    d_b, dh = in_one_pass(dy, h, b, -0.25, processor_count)
    assert torch.equal(d_b, (dy.double().T @ h.double()).to(adapter_dtype))
    assert torch.equal(dh, (-0.25 * dy.double() @ b.double()).to(dtype))


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pairwise(
    {"r": [8, 64, 128], "m,n": {"1": (1, 4096), "narrow": (4096, 1024), "wide": (8192, 14336)}}
)
@every_gpu
def test_one_pass_pays_where_it_moves_fewer_bytes(target, m, n, r):
    """One pass is used only if it saves bytes, and always if it saves a quarter or more.

    Compares the bytes of both variants' launches, on meta tensors.
    """
    dy, h, b, out = meta(m, n), meta(m, r), meta(n, r), meta(n, r)
    calls = (
        lambda: weight_grad(dy, [h], [out], precision="ieee", b=b),
        lambda: weight_grad(dy, [h], [out], precision="ieee"),
        lambda: project(dy, [b], [1.0], precision="ieee"),
    )
    together, *apart = (moved(launched(call, target)) for call in calls)
    apart = sum(apart)
    with use_target(target):
        pays = one_pass_pays(dy, b, "ieee")
    assert together < apart if pays else together > 0.75 * apart


@pairwise(
    {
        "r": [8, 16, 64],
        "count": [1, 2, 3],
        "p": {"plain": 0.0, "masked": 0.1},
        "m,n": {"few": (65, 4096), "narrow": (1000, 1024), "wide": (MANY_ROWS - 1, 14336)},
    }
)
@every_gpu
def test_low_rank_is_a_launch_less_than_two_kernels_for_hardly_more_bytes(
    target, m, n, r, count, p
):
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


def test_low_rank_pays_for_few_rows_and_up_to_three_masks_where_a_config_fits():
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
