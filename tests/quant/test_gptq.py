"""GPTQ-Model's layers as packed weights: the very numbers, or why not."""

import pytest
import torch
from vendor_layers import quantised

from fastlora.quant import gptq as vendor
from fastlora.quant.vendor import PackedLayer

qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="needs gptqmodel")
K, N = 128, 96


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["in-order", "disordered"])
def test_the_numbers_are_gptq_model_s(bits, order):
    layer = quantised("gptq", K, N, torch.float16, bits=bits, disordered=order != "in-order")
    assert vendor.owns(layer, type(layer))
    found = vendor.read(layer)
    assert isinstance(found, PackedLayer)
    assert found.weight.format.ordered is (order == "in-order")
    theirs = layer.dequantize_weight().T
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(found.weight.dense(dtype), theirs.to(dtype))
    x = torch.randn(3, K)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, theirs.float(), layer.bias.float())
    )


def test_groups_that_change_are_looked_at_again():
    layer = quantised("gptq", K, N)
    assert vendor.read(layer).weight.format.ordered
    layer.g_idx.copy_(layer.g_idx.flip(0))
    found = vendor.read(layer).weight
    assert not found.format.ordered
    assert torch.equal(found.dense(torch.float16), layer.dequantize_weight().T)


def test_a_class_with_a_forward_of_its_own_is_none_of_theirs():
    class Doubled(qlinear.TorchLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not vendor.owns(quantised("gptq", K, N), Doubled)


def test_what_no_format_reads_is_said():
    layer = quantised("gptq", K, N)
    layer.online_full_had = True
    assert "rotated" in vendor.read(layer)
    layer.online_full_had = False
    layer.planar = True
    assert "planes" in vendor.read(layer)
    layer.planar = False
    layer.scales = layer.scales[:-1]
    assert vendor.read(layer).startswith("its quantisation state is broken")
