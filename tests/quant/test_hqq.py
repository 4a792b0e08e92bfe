"""HQQ's HQQLinear as a packed weight."""

import pytest
import torch
from torch import nn

from fastlora.quant import hqq as vendor
from fastlora.quant.vendor import PackedLayer

quantize = pytest.importorskip("hqq.core.quantize", reason="HQQ isn't installed")
N, K = 40, 128


def quantised(bits=4, group=32, dtype=torch.float32, axis=1):
    torch.manual_seed(0)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    linear = nn.Linear(K, N)
    return quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


CASES = {
    "8": lambda: quantised(8, None),
    "4-bf16": lambda: quantised(4, 64, torch.bfloat16),
    "3-fp16": lambda: quantised(3, 32, torch.float16),
    "2": lambda: quantised(2, 32),
    "1": lambda: quantised(1, 32),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_the_numbers_are_hqq_s(make):
    linear = make()
    assert vendor.owns(linear, type(linear))
    found = vendor.read(linear)
    assert isinstance(found, PackedLayer)
    for dtype in (linear.compute_dtype, torch.float64):
        assert torch.equal(found.weight.dense(dtype), linear.dequantize().to(dtype))


def test_what_no_format_reads_is_said():
    assert "axis=0" in vendor.read(quantised(axis=0))
    linear = quantised()
    linear.meta["quant_zero"] = True
    assert "packed, too" in vendor.read(linear)
    linear.meta["quant_zero"] = False
    linear.meta["scale"] = linear.meta["scale"][:-1]
    assert vendor.read(linear).startswith("its quantisation state is broken")
    linear.ready = False
    assert "isn't quantised as yet" in vendor.read(linear)
