"""bitsandbytes' layers as packed weights: the very bits that it dequantizes, or why not."""

import re

import pytest
import torch
from torch import nn
from vendor_layers import dequantized, quantized, repack

from fastlora.formats import quantized_weight, vendor_of

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=["uint8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_four_bits_are_the_vendors(kind, nested, storage, dtype):
    layer = quantized(kind, 192, 70, compress_statistics=nested, quant_storage=storage)
    layer.weight.quant_state.dtype = dtype
    found = quantized_weight(layer)
    assert found.compute_dtype == torch.float32
    assert torch.equal(found.weight.dense(dtype), dequantized(layer))


@pytest.mark.parametrize(("k", "block"), [(66, 64), (100, 128), (7, 32), (51, 256), (4096, 4096)])
def test_blocks_of_any_size_over_rows_of_any_length(k, block):
    weight = torch.randn(9, k)
    layer = bnb.nn.Linear4bit(k, 9, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", blocksize=block).to("cpu")
    assert torch.equal(quantized_weight(layer).weight.dense(torch.float32), dequantized(layer))


def test_blocks_that_end_inside_a_row_of_whole_vectors():
    """bitsandbytes 0.50's own kernel for AVX-512 takes another block's absmax here."""
    weight = torch.randn(32, 96)
    layer = bnb.nn.Linear4bit(96, 32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4").to("cpu")
    error = quantized_weight(layer).weight.dense(torch.float32) - weight
    assert error.norm() < 0.11 * weight.norm()  # what 4 bits lose of normal numbers


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_int8_is_the_vendors(called):
    layer = quantized("int8")
    if called:
        layer(torch.randn(3, 256))
    weight, compute_dtype, restores, rounds_input = quantized_weight(layer)
    assert (compute_dtype, restores, rounds_input) == (None, False, True)
    for dtype in (torch.float32, torch.bfloat16):
        # As its training multiplies: the library's own dequantization rounds otherwise.
        scale = (layer.weight.SCB if layer.state.SCB is None else layer.state.SCB).unsqueeze(1)
        theirs = layer.weight.data.to(dtype).mul_(scale.mul(1.0 / 127.0))
        assert torch.equal(weight.dense(dtype), theirs)
    torch.testing.assert_close(weight.dense(torch.float32), dequantized(layer))


def test_a_state_that_only_the_layer_has_left():
    """As FSDP leaves it."""
    layer = quantized("nf4")
    expected = dequantized(layer)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(quantized_weight(layer).weight.dense(torch.float32), expected)


def not_quantized(kind: str) -> nn.Module:
    if kind == "int8":
        return bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    return bnb.nn.Linear4bit(128, 64, quant_type=kind)


def corrupt(**changes) -> nn.Module:
    layer = quantized("nf4")
    for name, value in changes.items():
        setattr(layer.weight.quant_state, name, value)
    return layer


REASONS = {
    "four-bits-to-come": (lambda: not_quantized("nf4"), "isn't quantized as yet"),
    "int8-to-come": (lambda: not_quantized("int8"), "isn't quantized as yet"),
    "in-every-call": (lambda: bnb.nn.Linear8bitLt(128, 64), "quantized in every call"),
    "threshold": (lambda: quantized("int8", threshold=6.0), "its outlier threshold is 6.0"),
    "no-absmax": (lambda: corrupt(absmax=None), "its quantization state is broken"),
    "short-absmax": (
        lambda: corrupt(absmax=torch.zeros(3, dtype=torch.uint8)),
        r"is broken: its absmax has shape \(3,\), but must be \(384,\)",
    ),
    "kind": (lambda: corrupt(quant_type="nf5"), "its kind is 'nf5'"),
    "shape": (lambda: corrupt(shape=torch.Size([64, 64])), r"is of a weight of shape \(64, 64\)"),
    "no-shape": (lambda: corrupt(shape=None), "its quantization state is broken"),
}


@pytest.mark.parametrize(("make", "match"), REASONS.values(), ids=REASONS.keys())
def test_what_cant_be_read_says_why(make, match):
    layer = make()
    reason = quantized_weight(layer)
    assert isinstance(reason, str)
    assert re.search(match, reason), reason


def test_a_class_with_a_forward_of_its_own_is_nobodys():
    class Other(bnb.nn.Linear4bit):
        def forward(self, x):
            return super().forward(x) + 1

    assert vendor_of(Other(4, 4)) is None
    assert vendor_of(bnb.nn.LinearNF4(4, 4)) is not None
    assert quantized_weight(nn.Linear(4, 4)) is None


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_a_weight_that_a_call_in_evaluation_repacked(nested):
    layer = quantized("nf4", compress_statistics=nested)
    before = quantized_weight(layer).weight.dense(torch.float32)
    repack(layer)
    after = quantized_weight(layer).weight.dense(torch.float32)
    assert torch.equal(after == 0, before == 0)
    assert ((after - before).abs() <= before.abs() / 2**8).all()  # absmax is bfloat16 there
    with torch.no_grad():
        assert "repacked for bitsandbytes' own CPU kernel" in quantized_weight(layer)
