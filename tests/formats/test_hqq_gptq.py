"""HQQ's and GPTQ-Model's layers as packed weights: equal to the vendor's values, or a reason."""

import pytest
import torch
from vendor_layers import quantized

from fastlora.formats import gptqmodel, hqq

K, N = 128, 96
GROUPS = {  # bits, group size and dtype
    "8": (8, None, torch.float32),
    "4-bf16": (4, 64, torch.bfloat16),
    "3-fp16": (3, 32, torch.float16),
    "2": (2, 32, torch.float32),
    "1": (1, 32, torch.float32),
}


def hqq_linear(bits=4, group=32, dtype=torch.float32, axis=1):
    quantize = pytest.importorskip("hqq.core.quantize", reason="HQQ isn't installed")
    torch.manual_seed(0)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    linear = torch.nn.Linear(K, N)
    return quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("case", GROUPS)
def test_the_numbers_are_hqq_s(case):
    linear = hqq_linear(*GROUPS[case])
    assert hqq.owns(linear, type(linear))
    found = hqq.read(linear)
    for dtype in (linear.compute_dtype, torch.float64):
        assert torch.equal(found.weight.dense(dtype), linear.dequantize().to(dtype))


def test_unreadable_hqq_layers_have_a_reason():
    assert "axis=0" in hqq.read(hqq_linear(axis=0))
    linear = hqq_linear()
    linear.meta["quant_zero"] = True
    assert "also packed" in hqq.read(linear)
    linear.ready = False
    assert "isn't quantized as yet" in hqq.read(linear)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["in-order", "disordered"])
def test_the_numbers_are_gptq_model_s(bits, order):
    layer = quantized("gptq", K, N, torch.float16, bits=bits, disordered=order != "in-order")
    assert gptqmodel.owns(layer, type(layer))
    found = gptqmodel.read(layer)
    theirs = layer.dequantize_weight().T
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(found.weight.dense(dtype), theirs.to(dtype))
    x = torch.randn(3, K)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, theirs.float(), layer.bias.float())
    )


def test_groups_that_change_are_read_again():
    layer = quantized("gptq", K, N)
    found = gptqmodel.read(layer).weight
    layer.g_idx.copy_(layer.g_idx.flip(0))
    assert torch.equal(found.dense(torch.float16), layer.dequantize_weight().T)


def test_unreadable_gptq_layers_have_a_reason():
    layer = quantized("gptq", K, N)

    class Doubled(type(layer)):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not gptqmodel.owns(layer, Doubled)
    layer.online_full_had = True
    assert "rotated" in gptqmodel.read(layer)
    layer.online_full_had = False
    layer.planar = True
    assert "planes" in gptqmodel.read(layer)
    layer.planar = False
    layer.qzeros = None
    assert gptqmodel.read(layer).startswith("its quantization state is broken")
