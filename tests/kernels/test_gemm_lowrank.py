"""gemm_lowrank: Σ p q + Σ keep ∘ (u v) (+ bias), both orientations and both loaders."""

import pytest
import torch
from judge import assert_close
from kernel_cases import (
    BF16,
    DEVICE,
    F16,
    F32,
    LAYOUTS,
    draw_seeds,
    keep_masks,
    poisoned,
    processors,
    random,
    recorded,
)
from marks import pairwise
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.gemm_lowrank import gemm_lowrank
from fastlora.kernels.gemm_lowrank_few_rows import gemm_lowrank_few_rows
from fastlora.kernels.lowrank import lowrank

TILES = {"16x16x16": (16, 16, 16), "32x64x32": (32, 64, 32), "64x32x16": (64, 32, 16)}
MASKED = {"plain": False, "masked": True}
SMALL = GemmConfig(16, 16, 16, warps=4, stages=2, group=3)
DESCRIPTORS = GemmConfig(32, 32, 16, warps=4, stages=2, descriptors=True)


def case(m, n, depths, ranks, dtype=F32, adapter_dtype=None, layouts=("contiguous",) * 3):
    """p, q, u, v of one call; ``layouts``: p's, q's and v's."""
    p_layout, q_layout, v_layout = layouts
    return (
        [random(m, k, dtype, p_layout) for k in depths],
        [random(k, n, dtype, q_layout) for k in depths],
        [random(m, r, dtype) for r in ranks],
        [random(r, n, adapter_dtype or dtype, v_layout) for r in ranks],
    )


def transposed(matrices):
    """Equal matrices in the memory layout of weight.T."""
    return [matrix.T.contiguous().T for matrix in matrices]


def check(ps, qs, us, vs, *, bias=None, p=0.0, seeds=None, add=False, config=None):
    """Check the output against float64 and return it; memory around it must stay unwritten."""
    dtype, (m, n) = us[0].dtype, (len(us[0]), vs[0].shape[1])
    memory = poisoned(m + 4, n, dtype=dtype)
    out = memory[2:-2]
    before = random(m, n, dtype) if add else torch.zeros(m, n, dtype=dtype, device=DEVICE)
    if add:
        out.copy_(before)
    options = {"bias": bias, "dropout": p, "seeds": seeds, "add": add, "config": config}
    if ps:
        gemm_lowrank(out, ps, qs, us, vs, precision="ieee", **options)
    else:
        lowrank(out, us, vs, precision="ieee", **options)
    assert memory[:2].isnan().all()
    assert memory[-2:].isnan().all()

    masks = keep_masks(seeds, (m, n), p, len(us))

    def formula(convert):
        total = convert(before)
        for left, right in zip(ps, qs, strict=True):
            total = total + convert(left) @ convert(right)
        for left, right, mask in zip(us, vs, masks, strict=True):
            total = total + torch.where(mask, convert(left) @ convert(right.to(dtype)), 0)
        return total if bias is None else total + convert(bias)

    truth, size = formula(torch.Tensor.double), formula(lambda tensor: tensor.double().abs())
    assert_close("out", out, truth, formula(lambda tensor: tensor.to(dtype)), size, dtype)
    return out


@pytest.mark.parametrize("orientation", ["y", "dx"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (17, 1, 50), (1, 33, 1), (70, 33, 50), (2, 100, 17)]
)
def test_any_shape(m, n, k, orientation):
    ps, qs, us, vs = case(m, n, [k], [3])
    check(ps, transposed(qs) if orientation == "y" else qs, us, vs)


@pairwise({"count": [2, 5, 9], "add": {"write": False, "add": True}, "dropout": [0.0, 0.4]})
def test_a_group_of_any_size_depths_and_ranks(count, add, dropout):
    depths = [20 + 7 * i for i in range(count)]
    ranks = [(1, 16, 70, 3)[i % 4] for i in range(count)]
    seeds = draw_seeds(count) if dropout else None
    operands = case(40, 50, depths, ranks, BF16, F32)
    check(*operands, bias=random(1, 50)[0], p=dropout, seeds=seeds, add=add)


@pytest.mark.parametrize(
    ("p_layout", "q_layout"),
    [
        *((each, "contiguous") for each in LAYOUTS[1:]),
        *(("contiguous", each) for each in LAYOUTS[1:]),
    ],
)
def test_any_strides(p_layout, q_layout):
    check(*case(20, 24, [24], [20], BF16, BF16, (p_layout, q_layout, p_layout)), config=SMALL)


@pairwise({"r": [5, 150], "masked": MASKED, "bias": {"": False, "bias": True}})
def test_low_rank_products_without_a_base(bias, r, masked):
    """The low-rank term that is added to a product computed by torch: several launches."""
    seeds, b = draw_seeds(5) if masked else None, random(1, 33, F16)[0] if bias else None
    operands = case(40, 33, [], [r, 3, 8, 1, 16], BF16, F32)
    for add in (False, True):
        check(*operands, bias=b, p=0.3 if masked else 0.0, seeds=seeds, add=add)


@pairwise({"stride": [0, 1, 3], "dtype": {"f32": F32, "bf16": BF16, "f16": F16}})
def test_a_bias_of_any_dtype_and_stride(dtype, stride):
    bias = torch.as_strided(random(1, 200, dtype)[0], (50,), (stride,))
    check(*case(20, 50, [30], [4], BF16), bias=bias)


@pairwise(
    {
        "tile": TILES,
        "group": [1, 3, 8],
        "aligned": {"ragged": False, "aligned": True},
        "masked": MASKED,
    }
)
def test_any_tile(tile, group, aligned, masked):
    config = GemmConfig(*tile, warps=4, stages=2, group=group, descriptors=True)
    n, k = (72, 24) if aligned else (37, 23)
    seeds = draw_seeds(2) if masked else None
    check(*case(40, n, [k, k], [5, 20], BF16, F32), p=0.4, seeds=seeds, config=config)


@pairwise(
    {
        "tile": TILES,
        "layout": ["contiguous", "window"],
        "orientation": ["y", "dx"],
        "masked": MASKED,
    }
)
def test_both_loaders_give_the_same_bits(tile, layout, orientation, masked):
    """With descriptors, few programs (here 2) walk over all tiles, unless a group is masked."""
    ps, qs, us, vs = case(40, 72, [24, 8], [5, 70], BF16, F32, (layout, layout, "contiguous"))
    if orientation == "y":
        qs = [random(72, len(q), BF16, layout).copy_(q.T).T for q in qs]
    seeds, found = draw_seeds(2) if masked else None, []
    for descriptors in (False, True):
        config = GemmConfig(*tile, warps=4, stages=2, group=2, descriptors=descriptors)
        with processors(2), recorded() as records:
            found.append(check(ps, qs, us, vs, p=0.4, seeds=seeds, config=config))
        (record,) = records
        assert record.arguments["DESCRIPTORS"] is descriptors
        assert record.arguments["Q_TRANSPOSED"] is (orientation == "y")
        assert (record.grid == (2,)) is (descriptors and not masked)
    assert torch.equal(*found)


def test_descriptors_are_arguments_of_their_own():
    """A launch of Triton 3.6 finds descriptors only there; it doesn't look inside of tuples."""
    with recorded() as records:
        check(*case(40, 72, [24, 8], [5, 70], BF16, F32), config=DESCRIPTORS)
    (arguments,) = (record.arguments for record in records)
    found = [name for name, value in arguments.items() if isinstance(value, TensorDescriptor)]
    assert sorted(found) == ["out", "p0", "p1", "q0", "q1"]
    tuples = [value for value in arguments.values() if isinstance(value, tuple)]
    assert not any(isinstance(each, TensorDescriptor) for value in tuples for each in value)


@pytest.mark.parametrize(
    ("reason", "n", "k", "layouts"),
    [
        ("rows of q and out of 66 bytes", 33, 40, ("contiguous",) * 3),
        ("rows of p of 34 bytes", 40, 17, ("contiguous",) * 3),
        ("p column by column", 40, 40, ("column-major", "contiguous", "contiguous")),
        ("q with gaps", 40, 40, ("contiguous", "every-second-column", "contiguous")),
        ("p off by one element", 40, 32, ("odd", "contiguous", "contiguous")),
        ("one row of p for all", 40, 24, 0),
        ("rows of p that overlap", 40, 24, 8),  # TMA requires a stride of at least the row's length
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operands_that_no_descriptor_describes_are_loaded_by_pointers(reason, n, k, layouts):
    is_stride = isinstance(layouts, int)
    ps, *others = case(35, n, [k], [3], BF16, layouts=("contiguous",) * 3 if is_stride else layouts)
    if is_stride:
        ps = [torch.as_strided(random(1, 320, BF16), (35, k), (layouts, 1))]
    with recorded() as records:
        check(ps, *others, config=DESCRIPTORS)
    assert [record.arguments["DESCRIPTORS"] for record in records] == [False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("r", [2, 70])
def test_dropped_infinities_and_nan_have_no_effect(r, value):
    """An infinity in v reaches only the kept elements of its column."""
    ps, qs, us, vs = case(20, 40, [16], [r])
    seeds = draw_seeds(1)
    (mask,) = keep_masks(seeds, (20, 40), 0.5, 1)
    vs[0][0, 5] = value
    out = poisoned(20, 40)
    gemm_lowrank(out, ps, qs, us, vs, precision="ieee", dropout=0.5, seeds=seeds)
    reached = torch.zeros_like(mask)
    reached[:, 5] = mask[:, 5]
    assert torch.equal(~out.isfinite(), reached)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_nothing_is_rounded_between_steps_over_the_rank(masked):
    """u v reaches a million, too much for float16, and comes back to 96."""
    us, vs = [torch.ones(16, 128, dtype=F16, device=DEVICE)], [random(128, 32, F16)]
    vs[0][:64], vs[0][64:127], vs[0][127] = 16384, -16384, -16288
    seeds, out = draw_seeds(1) if masked else None, poisoned(16, 32, dtype=F16)
    lowrank(out, us, vs, precision="ieee", dropout=0.5, seeds=seeds)
    (mask,) = keep_masks(seeds, (16, 32), 0.5, 1)
    assert torch.equal(out, 96 * mask.to(F16))


def test_a_bias_is_rounded_before_it_is_added():
    """To x's dtype, like torch: 1.005 is 1.0078125 in bfloat16."""
    u, v = torch.ones(4, 1, dtype=BF16, device=DEVICE), torch.full((1, 16), -1.0, device=DEVICE)
    out, bias = poisoned(4, 16, dtype=BF16), torch.full((16,), 1.005, device=DEVICE)
    lowrank(out, [u], [v], precision="ieee", bias=bias)
    assert (out == 0.0078125).all()


@pairwise(
    {
        "m,n,k": {"1": (1, 1, 1), "row": (1, 100, 33), "tma": (17, 72, 40), "deep": (40, 33, 100)},
        "descriptors": {"pointers": False, "descriptors": True},
        "orientation": ["y", "dx"],
    }
)
def test_u_made_in_the_same_launch(m, n, k, descriptors, orientation):
    """u = factor · p a, as computed by project, and the output that uses it."""
    (p,), (q,), _, (v,) = case(m, n, [k], [5], BF16, F32)
    if orientation == "y":
        (q,) = transposed([q])
    a, bias = random(k, 5, layout="column-major"), random(1, n)[0]
    u, out, expected = (poisoned(m, columns, dtype=BF16) for columns in (5, n, n))
    config = GemmConfig(16, 32, 16, warps=4, stages=2, descriptors=descriptors)
    options = {"precision": "ieee", "bias": bias, "config": config}
    gemm_lowrank_few_rows(out, p, q, a, u, v, 0.3, **options)
    truth, size = 0.3 * p.double() @ a.to(BF16).double(), 0.3 * p.double().abs() @ a.double().abs()
    assert_close("u", u, truth, (0.3 * (p.float() @ a.to(BF16).float())).to(BF16), size, BF16)
    gemm_lowrank(expected, [p], [q], [u], [v], **options)
    torch.testing.assert_close(out, expected)
