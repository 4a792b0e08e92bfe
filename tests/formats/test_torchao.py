"""torchao's tensors as packed weights: equal to its own values, or a reason."""

import sys

import pytest
import torch
import vendor_layers
from packed import by_elements, random_int4
from torch import nn

from fastlora.common.row_blocks import read_rows, source_of
from fastlora.formats import torchao as vendor
from fastlora.formats.float8 import Float8
from fastlora.formats.format import from_text
from fastlora.formats.torchao import Affine
from fastlora.formats.vendor import PackedLayer

quantization = pytest.importorskip("torchao.quantization", reason="torchao isn't installed")
N, K = 96, 128


def _config(name: str, **settings):
    return getattr(quantization, f"{name}Config")(**settings)


GROUPS, ASYMMETRIC = quantization.PerGroup(32), quantization.MappingType.ASYMMETRIC
CONFIGS = {
    "int8-rows": ("Int8WeightOnly", {}, Affine),
    "int8-one-scale": ("Int8WeightOnly", {"granularity": quantization.PerTensor()}, Affine),
    "int8-groups": ("Int8WeightOnly", {"granularity": GROUPS}, Affine),
    "int4-groups": ("IntxWeightOnly", {"weight_dtype": torch.int4, "granularity": GROUPS}, Affine),
    "int3-zero-points": (
        "IntxWeightOnly",
        {"weight_dtype": torch.int3, "granularity": GROUPS, "mapping_type": ASYMMETRIC},
        Affine,
    ),
    "float8": ("Float8WeightOnly", {}, Float8),
}


def quantized(config, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    quantization.quantize_(linear, config)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_numbers_are_torchao_s(config, dtype):
    name, settings, kind = CONFIGS[config]
    linear = quantized(_config(name, **settings), dtype)
    assert vendor.owns(linear, nn.Linear)
    found = vendor.read(linear)
    assert isinstance(found, PackedLayer)
    assert isinstance(found.weight.format, kind)
    assert torch.equal(found.weight.dense(dtype), linear.weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_int4_has_the_numbers_of_its_definition(dtype):
    weight = random_int4(12, 32, 8, torch.bfloat16)
    expected = by_elements(weight).to(dtype)
    assert torch.equal(weight.dense(dtype), expected)
    rows = read_rows(source_of(weight), 2, torch.empty(5, 32, dtype=dtype))
    assert torch.equal(rows, expected[2:7])
    assert from_text(weight.format.text) == weight.format


def test_packed_int4_as_torchao_s_library_makes_it(monkeypatch):
    """Its own quantizer rounds to the nearest of 16 values; the scale is their distance."""
    shuffle = pytest.importorskip("mslk.quantize.shuffle", reason="needs mslk")
    weight, module = torch.randn(N, K), sys.modules[quantization.Int4Tensor.from_hp.__module__]
    for name in ("int4_row_quantize_zp", "pack_int4"):
        monkeypatch.setattr(module, name, getattr(shuffle, name))
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(quantization.Int4Tensor.from_hp(weight, [1, 32]), False)
    dense = vendor.read(linear).weight.dense(torch.float32)
    half = linear.weight.scale.T.repeat_interleave(32, 1) / 2
    assert ((dense - weight).abs() <= half * 1.001).all()


ROUNDING = {
    "int8": lambda: _config("Int8DynamicActivationInt8Weight"),
    "int4": lambda: _config(
        "Int8DynamicActivationIntxWeight", weight_dtype=torch.int4, weight_granularity=GROUPS
    ),
}


@pytest.mark.parametrize("make", ROUNDING.values(), ids=ROUNDING.keys())
def test_rounded_inputs_are_refused_since_torchao_gives_them_no_gradient(make):
    linear = quantized(make())
    assert "through which torchao gives no gradient" in vendor.read(linear)
    x = torch.randn(4, K, requires_grad=True)
    y = linear(x)
    dx = torch.autograd.grad(y.sum(), x, allow_unused=True)[0] if y.requires_grad else None
    assert dx is None or not dx.any()


def test_unreadable_tensors_have_a_reason():
    packed = vendor_layers.quantized("torchao-int4-packed", K, N)
    packed.weight.activation_dtype = torch.float8_e4m3fn
    assert "rounded to float8" in vendor.read(packed)
    linear = quantized(_config("Int8WeightOnly"))
    linear.weight.act_pre_scale = torch.ones(K)
    assert "act_pre_scale" in vendor.read(linear)
    linear.weight.act_pre_scale = None
    linear.weight.scale = linear.weight.scale[:-1]
    assert vendor.read(linear).startswith("its Int8Tensor is broken")


def test_zero_points_that_change_are_looked_at_again():
    linear = quantized(_config("Int8WeightOnly"))
    assert not vendor.read(linear).weight.format.shifted
    linear.weight.zero_point.fill_(3)
    assert vendor.read(linear).weight.format.shifted
    assert torch.equal(vendor.read(linear).weight.dense(torch.float32), linear.weight.dequantize())


def test_a_plain_linear_is_none_of_torchao_s():
    assert not vendor.owns(nn.Linear(2, 2), nn.Linear)
