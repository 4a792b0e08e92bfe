"""transformers' FP8Linear as a packed weight."""

import pytest
import torch
from transformers.integrations import finegrained_fp8

from fastlora.quant import float8 as vendor
from fastlora.quant.vendor import PackedLayer

N, K = 200, 300


def quantised(block=(128, 128), scales=torch.float32, fmt="float"):
    torch.manual_seed(0)
    linear = finegrained_fp8.FP8Linear(K, N, block_size=block, scale_fmt=fmt)
    linear.weight.data = torch.randn(N, K).to(torch.float8_e4m3fn)
    scale = torch.rand(linear.weight_scale_inv.shape) + 0.5
    linear.weight_scale_inv.data = scale.to(linear.weight_scale_inv.dtype)
    return linear.requires_grad_(False)


CASES = {
    "blocks": lambda: quantised(),
    "powers": lambda: quantised(fmt="ue8m0"),
    "one-scale": lambda: quantised(None),
    "rows": lambda: quantised((1, K)),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_the_numbers_are_transformers(make):
    linear = make()
    assert vendor.owns(linear, type(linear))
    found = vendor.read(linear)
    assert isinstance(found, PackedLayer)
    expected = finegrained_fp8._dequantize_fp8_weight(
        linear.weight, linear.weight_scale_inv, linear.block_size, torch.float32
    )
    assert torch.equal(found.weight.dense(torch.float32), expected)
    assert torch.equal(found.weight.dense(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_a_weight_is_packed_as_the_layer_s_own(make):
    linear = make()
    kept, before = vendor.take(linear), vendor.read(linear).weight.dense(torch.float32)
    changed = before * 3
    vendor.put(linear, vendor.pack(linear, changed))
    found = vendor.read(linear)
    after = found.weight.dense(torch.float32)
    assert ((after - changed).abs() <= changed.abs() / 8 + changed.abs().max() / 2**9).all()
    vendor.put(linear, kept)
    assert torch.equal(vendor.read(linear).weight.dense(torch.float32), before)


def test_what_is_broken_or_no_float8_is_said():
    linear = quantised()
    linear.weight_scale_inv.data = torch.ones(3, 3)
    assert vendor.read(linear).startswith("its float8 weight is broken")
    linear.weight.data = linear.weight.data.view(torch.int8)
    assert "float4" in vendor.read(linear)
    linear.weight.data = torch.ones(N, K)
    assert "dense torch.float32" in vendor.read(linear)
    grouped = finegrained_fp8.FP8GroupedLinear(K, N, 2, (128, 128))
    assert not vendor.owns(grouped, type(grouped))
