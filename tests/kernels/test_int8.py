"""8-bit products: rows rounded by quantize_rows, exact integer sums by gemm_int8_lowrank."""

import pytest
import torch
from int8_products import Scales, check_product, check_rounding, random_codes
from kernel_cases import BF16, DEVICE, F16, F32, draw_seeds, poisoned, random, recorded
from marks import pairwise

from fastlora.backends.triton.verification import _exact_rows
from fastlora.formats.rotated_int8 import quantize_rows
from fastlora.kernels import launchers as kernels
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.gemm_int8_lowrank import gemm_int8_lowrank

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(DEVICE != "cpu", reason="its truth is computed on a CPU"),
]

DTYPES = {"f32": F32, "bf16": BF16, "f16": F16}


@pairwise(
    {
        "m": [1, 2, 33, 70],
        "k": [1, 63, 64, 65, 136, 330],
        "dtype": DTYPES,
        "layout": ["contiguous", "column-major", "every-second-column", "window", "odd"],
        "of": {"x": False, "dy": True},
    }
)
def test_rows_are_rounded(m, k, dtype, layout, of):
    """x after its rotation, or dy times factors."""
    factors = torch.rand(k) + 0.01 if of else None
    check_rounding(random(m, k, dtype, layout), factors)


def by_format(x, factors=None):
    return quantize_rows(x, factors, rotated=factors is None)


def by_kernel(x, factors=None):
    codes, scales = random_codes(*x.shape), poisoned(len(x))
    kernels.quantize_rows(x, codes, scales, factors, precision="ieee")
    return codes, scales


@pytest.mark.parametrize("k", [5, 64, 200])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_exact_rows_have_the_format_s_codes_bit_for_bit(dtype, k):
    """Their rotation is exact in any order, so that every backend rounds them to the same codes."""
    x = _exact_rows((70, k), torch.Generator().manual_seed(3)).to(dtype)
    assert all(map(torch.equal, by_kernel(x), by_format(x.double())))


both = pytest.mark.parametrize("quantize", [by_format, by_kernel])


@both
def test_a_rotated_float16_number_may_exceed_its_range(quantize):
    codes, scale = quantize(torch.full((3, 128), 3e4, dtype=F16))
    assert torch.equal(scale, torch.full((3,), 24e4 / 127))
    assert (codes.view(6, 64) == torch.tensor([127] + [0] * 63)).all()


x_and_dy = pytest.mark.parametrize("factors", [None, torch.ones(96)], ids=["x", "dy"])


@both
@x_and_dy
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_such_a_scale_and_the_others_keep_theirs(
    quantize, value, factors
):
    """The last columns aren't rotated; columns before them spread the value over their block."""
    x, bad = random(40, 96, BF16), torch.zeros(40, dtype=torch.bool)
    expected = [each.clone() for each in quantize(x, factors)]
    x[3, 7], x[20, 90], bad[[3, 20]] = value, value, True
    codes, scales = quantize(x, factors)
    assert torch.equal(~scales.isfinite(), bad)
    assert torch.equal(codes[~bad], expected[0][~bad])
    assert torch.equal(scales[~bad], expected[1][~bad])
    # A product with these codes isn't finite in the bad rows, and finite in the others.
    out, q, columns = poisoned(40, 64, dtype=BF16), random_codes(64, 96).mT, torch.ones(64)
    gemm_int8_lowrank(out, [codes], [q], [], [], [scales], columns, precision="ieee")
    assert torch.equal(~out.isfinite().any(1), bad)
    assert torch.equal(~out.isfinite().all(1), bad)


@both
@x_and_dy
def test_a_row_of_zeros_has_codes_of_zero(quantize, factors):
    x = random(20, 96, BF16)
    x[4], x[5] = 0, 1e-38
    codes, scales = quantize(x, factors)
    assert not codes[4:6].any()
    assert (scales[4:6] == torch.tensor(2.0**-100) / 127).all()


@both
def test_halves_are_rounded_to_even(quantize):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]])
    assert quantize(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 4]]


def ones(ps, n: int | None) -> Scales:
    """Scales of 1, with which :func:`check_product` requires equal bits."""
    return Scales([torch.ones(len(p)) for p in ps], None if n is None else torch.ones(n))


@pairwise({"m": [1, 17, 70], "n": [1, 33, 100], "k": [1, 31, 100, 1000]})
def test_sums_are_exact_bit_for_bit(m, n, k):
    """y: float32 represents every sum of up to 1000 products."""
    p, q = random_codes(m, k), random_codes(n, k).mT
    check_product([p], [q], ones([p], n))


def test_the_largest_sums_are_exact():
    p = torch.full((3, 1040), 127, dtype=torch.int8)
    check_product([p], [-p[:1].expand(64, -1).mT], ones([p], 64))


@pairwise(
    {
        "m": [1, 40],
        "n": [5, 64, 100, 130],
        "depths": {"one": (70,), "three": (20, 33, 40)},
        "turned": {"rows": False, "columns": True},
    }
)
def test_a_rotated_sum_is_exact_bit_for_bit(m, n, depths, turned):
    """dx: the rotation of these sums is exact in float32."""
    ps, qs = [random_codes(m, k) for k in depths], [random_codes(k, n) for k in depths]
    check_product(ps, [q.mT.contiguous().mT for q in qs] if turned else qs, ones(ps, None))


def operands(m, n, depths, ranks, dtype, of_y):
    ps, qs = [random_codes(m, k) for k in depths], [random_codes(n, k) for k in depths]
    scales = Scales([torch.rand(m) / 127 for _ in ps], torch.rand(n) / 127 if of_y else None)
    qs = [q.mT if of_y else q.mT.contiguous() for q in qs]
    return ps, qs, scales, [random(m, r, dtype) for r in ranks], [random(r, n, F32) for r in ranks]


TILES = {
    "small": GemmConfig(16, 64, 32, warps=4, stages=2, group=3),
    "wide": GemmConfig(32, 128, 64, warps=4, stages=2, descriptors=True),
}


@pairwise(
    {
        "dtype": DTYPES,
        "of_y": {"y": True, "dx": False},
        "masked": {"plain": False, "masked": True},
        "ranks": {"none": (), "one": (3,), "two": (70, 16)},
        "size": {"ragged": (37, 90, 53), "aligned": (40, 144, 64)},
        "tile": TILES,
        "bias": {"": False, "bias": True},
    }
)
def test_scales_low_rank_term_and_bias(dtype, of_y, masked, ranks, size, tile, bias):
    (m, n, k), count = size, len(ranks)
    depths = (k,) if of_y else (k, k + 16)
    seeds = draw_seeds(count) if masked and count else None
    b = random(1, n, F32)[0] if bias else None
    given = operands(m, n, depths, ranks, dtype, of_y)
    p = 0.4 if seeds is not None else 0.0
    check_product(*given, dtype=dtype, bias=b, p=p, seeds=seeds, config=tile)


@pytest.mark.parametrize("count", [0, 2, 6])
def test_more_products_than_a_launch_takes(count):
    """Frozen layers have no adapter, so there may be more products than low-rank terms."""
    check_product(*operands(20, 70, (20,) * 6, (3,) * count, F32, False))


def test_int8_operands_of_aligned_rows_are_loaded_by_descriptors():
    given = operands(40, 144, (64,), (3,), BF16, True)
    with recorded() as records:
        check_product(*given, dtype=BF16)
        check_product(*operands(40, 144, (72,), (3,), BF16, True), dtype=BF16)
    assert [each.arguments["DESCRIPTORS"] for each in records] == [True, False]


def test_tiles_that_cut_a_rotated_block_are_refused():
    with pytest.raises(ValueError, match="64 columns"):
        check_product(*operands(8, 64, (32,), (), F32, False), config=GemmConfig(16, 32, 32, 4, 2))
