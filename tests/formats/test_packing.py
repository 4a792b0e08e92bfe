"""Packing dense weights: the nearest codes, equal to the vendors' codes, and the error."""

import sys
from types import SimpleNamespace

import pytest
import torch
from packed import NEEDS_5
from transformers.integrations import finegrained_fp8 as fp8

from fastlora.formats import arithmetic
from fastlora.formats.format import Quantized
from fastlora.formats.microscaled import E2M1, MXFP4
from fastlora.formats.packing import KINDS, pack_weight, packing_error

EVERY = pytest.mark.parametrize("kind", KINDS)
# The relative errors for normally distributed numbers, as measured.
ERRORS = {"nf4": 0.091, "mxfp4": 0.112, "nvfp4": 0.095, "fp8": 0.026, "int8": 0.0067}


@pytest.fixture(autouse=True)
def needs_bitsandbytes(request):
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes")


def hard(n: int = 200, k: int = 192, dtype=torch.float32) -> torch.Tensor:
    """Numbers of all sizes, signs and zeros; also a block of zeros and a block of tiny numbers."""
    torch.manual_seed(0)
    weight = torch.randn(n, k).mul(torch.randn(n, k).exp2()) * torch.randn(n, 1).mul(8).exp2()
    weight[0, :64], weight[1, :64], weight[2, :64] = 0.0, -0.0, torch.randn(64) * 1e-12
    weight[128:, 128:] = 0.0
    return weight.to(dtype)


def assert_same(one: Quantized, two: tuple[torch.Tensor, ...]) -> None:
    for ours, theirs in zip(one.tensors, two, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        ours, theirs = (each.reshape(-1).view(torch.uint8) for each in (ours, theirs))
        assert torch.equal(ours, theirs)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_is_packed_as_near_as_its_kind_does(kind, dtype):
    torch.manual_seed(0)
    weight = torch.randn(256, 192, dtype=dtype)
    packed = pack_weight(weight, kind)
    packed.check()
    error = float((packed.dense(torch.float64) - weight).norm() / weight.double().norm())
    assert packing_error(weight, packed) == pytest.approx(error)
    assert error == pytest.approx(ERRORS[kind], rel=0.03)


@EVERY
def test_representable_values_are_packed_without_loss(kind):
    once = pack_weight(hard(dtype=torch.bfloat16), kind).dense(torch.float32)
    again = pack_weight(once, kind).dense(torch.float32)
    size = once.abs()
    if kind == "int8":  # rotating twice rounds beside the largest numbers of a row
        size = size.amax(1, keepdim=True)
    assert ((again - once).abs() <= 1e-6 * size).all()


@EVERY
def test_a_stack_is_each_of_its_experts_packed(kind):
    stack = torch.stack([hard(), -2 * hard(), torch.zeros(200, 192)])
    packed = pack_weight(stack, kind)
    packed.check()
    assert packed.shape == stack.shape
    for i, expert in enumerate(stack):
        assert_same(packed.one(i), pack_weight(expert, kind).tensors)
    assert not packed.dense(torch.float32)[2].any()
    parts = [packing_error(stack[i], packed.one(i)) ** 2 for i in range(2)]
    assert packing_error(stack, packed) ** 2 == pytest.approx((parts[0] + 4 * parts[1]) / 5)


@EVERY
def test_a_view_and_a_block_of_rows_at_a_time_change_nothing(kind, monkeypatch):
    expected = pack_weight(hard(400), kind).tensors
    monkeypatch.setattr(arithmetic, "rows_at_a_time", lambda weight: 150)
    wide = hard(400).repeat_interleave(2, 1)
    assert_same(pack_weight(wide[:, ::2], kind), expected)
    assert_same(pack_weight(hard(400).T.contiguous().T, kind), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_torchaos(dtype):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    scale, packed = mx.to_mx(
        hard(dtype=dtype), torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.EVEN
    )
    assert_same(pack_weight(hard(dtype=dtype), "mxfp4"), (packed, scale.view(torch.uint8)))


def test_mxfp4_rounds_the_largest_number_before_its_scale_is_taken():
    """1.875 rounds to 2 in two digits, so the scale is 1/2; with 1/4 it would be clipped to 1.5."""
    packed = pack_weight(torch.full((1, 32), 1.875), "mxfp4")
    assert (packed.dense(torch.float32) == 2.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_torchaos(dtype):
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = hard(dtype=dtype)
    factor = nvfp4.per_tensor_amax_to_scale(weight.abs().max())
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=factor)
    assert_same(pack_weight(weight, "nvfp4"), (theirs.qdata, theirs.scale, factor))


@pytest.mark.parametrize("size", [(256, 384), (3, 128, 128)], ids=str)
def test_fp8_is_transformers(size):
    weight = torch.randn(size) * 3
    weight[..., :128, :128] = 0
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    if not hasattr(fp8, "Fp8Quantize"):
        pytest.skip(NEEDS_5)
    theirs = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert(
        {"weight": weight}
    )
    assert_same(pack_weight(weight, "fp8"), (theirs["weight"], theirs["weight_scale_inv"]))


def test_fp8_scales_of_ragged_edges_use_only_existing_elements():
    weight = hard(130, 150)
    packed = pack_weight(weight, "fp8")
    corners = weight[:128, :128], weight[:128, 128:], weight[128:, :128], weight[128:, 128:]
    alone = [pack_weight(corner, "fp8").tensors[1].flatten() for corner in corners]
    assert torch.equal(packed.tensors[1].flatten(), torch.cat(alone))


def test_nf4_is_bitsandbytes_layers():
    bnb = pytest.importorskip("bitsandbytes")
    weight = hard(40, 96, torch.bfloat16)
    theirs = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=64)
    theirs = theirs.to("cpu")
    expected = (theirs.data.view(-1), theirs.quant_state.absmax)
    assert_same(pack_weight(weight, "nf4"), expected)


def test_e2m1_is_the_nearest_and_of_two_the_even_one():
    """A block of 32 has a 6, so its scale is 1."""
    values = torch.tensor(E2M1[:8])
    middles = (values[1:] + values[:-1]) / 2
    below, above = (torch.nextafter(middles, torch.tensor(far)) for far in (0.0, 9.0))
    weight = torch.cat([values, below, middles, above, torch.tensor([6.0, 6.9, 0.0])])
    packed = pack_weight(torch.stack([weight, -weight]), "mxfp4")
    assert (packed.tensors[1] == 127).all()
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    nearest = torch.cat([values, values[:-1], even, values[1:], torch.tensor([6.0, 6.0, 0.0])])
    assert torch.equal(packed.dense(torch.float32), torch.stack([nearest, -nearest]))


@pytest.mark.parametrize("size", [3e38, 2.0**-126, 2.0**-140, 2.0**-149], ids=str)
def test_mxfp4_at_the_ends_of_float32(size):
    """Tiny numbers are representable down to the smallest scale, 2⁻¹²⁷."""
    weight = torch.linspace(-1, 1, 32)[None] * size
    made = pack_weight(weight, "mxfp4").dense(torch.float32)
    assert made.isfinite().all()
    assert (made - weight).abs().max() <= max(size / 6, 2.0**-129)


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
@pytest.mark.parametrize("size", [3e38, 1e-28, 1e-35, 1e-44], ids=str)
def test_scales_of_large_and_tiny_numbers_are_finite(kind, size):
    weight = torch.linspace(-1, 1, 128)[None] * size
    packed = pack_weight(weight, kind)
    assert packed.dense(torch.float32).isfinite().all()
    assert packing_error(weight, packed) <= 1
    if size > 1e-30:
        assert packing_error(weight, packed) < 0.15


@EVERY
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_are_refused(kind, wrong):
    weight = hard()
    weight[150, 100] = wrong
    with pytest.raises(ValueError, match="has infinities or NaN"):
        pack_weight(weight[None], kind)


@pytest.mark.parametrize(
    ("kind", "columns", "match"),
    [
        ("mxfp4", 48, "has 48 numbers, but a block of MXFP4 has 32"),
        ("nvfp4", 40, "has 40 numbers, but a block of NVFP4 has 16"),
        ("int4", 64, "kind is 'int4', but must be one of nf4, mxfp4, nvfp4, fp8"),
    ],
)
def test_a_kind_or_rows_that_do_not_fit_are_refused(kind, columns, match):
    with pytest.raises(ValueError, match=match):
        pack_weight(torch.ones(4, columns), kind)


@pytest.mark.parametrize("weight", [torch.ones(64), torch.ones(0, 64), torch.ones(2, 64).int()])
def test_no_matrix_of_numbers_is_refused(weight):
    with pytest.raises(ValueError, match=r"must be floating, \[N, K\] or \[E, N, K\]"):
        pack_weight(weight, "mxfp4")


def test_nf4_without_bitsandbytes_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match=r"bitsandbytes.*fastlora-kernels\[quantized\]"):
        pack_weight(torch.ones(2, 64), "nf4")


def test_errors_of_nothing_and_of_unlike_shapes():
    packed = pack_weight(torch.zeros(2, 64), "mxfp4")
    assert isinstance(packed.format, MXFP4)
    assert packing_error(torch.zeros(2, 64), packed) == 0
    with pytest.raises(ValueError, match=r"the weight is \(2, 32\), the packed \(2, 64\)"):
        packing_error(torch.zeros(2, 32), packed)
