"""weight_grad: (keep ∘ v)ᵀ u for a group, and v b in the same pass, against float64."""

import pytest
import torch
from judge import assert_close
from kernel_cases import (
    BF16,
    F16,
    F32,
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

from fastlora.kernels import one_pass_pays, project, weight_grad
from fastlora.kernels.target import TARGETS, use_target
from fastlora.kernels.weight_grad import WeightGradConfig

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SMALL = WeightGradConfig(16, 32, warps=4, stages=2)


def outputs(n, ranks, dtype, orientation):
    """NaN tensors inside of larger NaN tensors, in the layout of d lora_b [n, r] or d lora_a.T."""
    outs = []
    for r in ranks:
        memory = poisoned(n * r + 20, dtype=dtype)[10:-10]
        outs.append(memory.view(n, r) if orientation == "d_lora_b" else memory.view(r, n).T)
    return outs


def check(v, us, dtype=F32, orientation="d_lora_a", p=0.0, seeds=None, config=None):
    """Check every product against float64 and return all; memory around them must stay NaN."""
    n = v.shape[1]
    outs = outputs(n, [u.shape[1] for u in us], dtype, orientation)
    weight_grad(v, us, outs, precision="ieee", dropout=p, seeds=seeds, config=config)
    masks = keep_masks(seeds, v.shape, p, len(us))
    for i, (out, u, mask) in enumerate(zip(outs, us, masks, strict=True)):
        kept = torch.where(mask, v, 0)
        truth, size = kept.double().T @ u.double(), kept.double().abs().T @ u.double().abs()
        assert_close(f"product {i}", out, truth, (kept.T @ u).to(dtype), size, v.dtype)
        around = torch.as_strided(out, (n * u.shape[1] + 20,), (1,), out.storage_offset() - 10)
        assert around[:10].isnan().all()
        assert around[-10:].isnan().all()
    return outs


@pairwise({"m": [1, 2, 17, 100], "n": [1, 17, 33, 100], "orientation": ["d_lora_a", "d_lora_b"]})
def test_any_shape(m, n, orientation):
    check(random(m, n), [random(m, 3)], orientation=orientation)


@pairwise(
    {
        "m": [65, 96, 100],
        "orientation": ["d_lora_a", "d_lora_b"],
        "dtype": {"f32": F32, "bf16": BF16},
    }
)
def test_split_over_rows(m, orientation, dtype):
    """The device decides whether planes are summed afterwards; the numbers agree."""
    v, us, seeds = random(m, 40), [random(m, 3), random(m, 4), random(m, 1)], draw_seeds(3)
    found = []
    for count in (1, 10**4):
        with processors(count), recorded() as records:
            found.append(check(v, us, dtype, orientation, 0.4, seeds, SMALL))
        assert len(records) == (1 if count == 1 else 2)
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(whole, split)


@pytest.mark.parametrize("tile", [(64, 16), (16, 128)], ids=str)
def test_any_tile(tile):
    config = WeightGradConfig(*tile, warps=8, stages=2)
    check(random(70, 90, BF16), [random(70, 130, BF16)], p=0.3, seeds=draw_seeds(1), config=config)


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


@pairwise(
    {"r": [8, 64, 128], "m,n": {"1": (1, 4096), "narrow": (4096, 1024), "wide": (8192, 14336)}}
)
@pytest.mark.parametrize(
    "target", [t for t in TARGETS.values() if t.kind != "cpu"], ids=lambda t: t.name
)
def test_one_pass_pays_where_it_moves_fewer_bytes(target, m, n, r):
    """One pass is used only if it saves bytes, and always if it saves a quarter or more.

    Compares the bytes of both variants' launches, on meta tensors.
    """
    dy, h, b, out = (
        torch.empty(shape, dtype=BF16, device="meta") for shape in ((m, n), (m, r), (n, r), (n, r))
    )

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
