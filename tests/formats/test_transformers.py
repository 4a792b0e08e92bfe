"""transformers' FP8Linear and GgufLinear as packed weights."""

import pytest
import torch
from packed import NEEDS_5, random_gguf
from transformers.integrations import finegrained_fp8

from fastlora.formats import float8, gguf
from fastlora.formats.gguf import KINDS

dequant = pytest.importorskip("transformers.integrations.gguf.dequant", reason=NEEDS_5)
utils = pytest.importorskip("transformers.integrations.gguf.utils", reason=NEEDS_5)

N, K = 200, 512


def fp8_linear(block=(128, 128), fmt="float"):
    torch.manual_seed(0)
    linear = finegrained_fp8.FP8Linear(K, N, block_size=block, scale_fmt=fmt)
    linear.weight.data = torch.randn(N, K).to(torch.float8_e4m3fn)
    scale = torch.rand(linear.weight_scale_inv.shape) + 0.5
    linear.weight_scale_inv.data = scale.to(linear.weight_scale_inv.dtype)
    return linear.requires_grad_(False)


FLOAT8 = {
    "blocks": fp8_linear,
    "wide-blocks": lambda: fp8_linear((32, 128)),
    "powers": lambda: fp8_linear(fmt="ue8m0"),
    "one-scale": lambda: fp8_linear(None),
    "rows": lambda: fp8_linear((1, K)),
}


@pytest.mark.parametrize("make", FLOAT8.values(), ids=FLOAT8.keys())
def test_float8_has_transformers_numbers(make):
    linear = make()
    assert float8.owns(linear, type(linear))
    found = float8.read(linear)
    expected = finegrained_fp8._dequantize_fp8_weight(
        linear.weight, linear.weight_scale_inv, linear.block_size, torch.float32
    )
    assert torch.equal(found.weight.dense(torch.float32), expected)
    assert torch.equal(found.weight.dense(torch.bfloat16), expected.bfloat16())


def test_broken_and_other_layers_have_a_reason():
    linear = fp8_linear()
    linear.weight_scale_inv.data = torch.ones(3, 3)
    assert float8.read(linear).startswith("its float8 weight is broken")
    linear.weight.data = linear.weight.data.view(torch.int8)
    assert "float4" in float8.read(linear)
    linear.weight.data = torch.ones(N, K)
    assert "dense torch.float32" in float8.read(linear)
    grouped = finegrained_fp8.FP8GroupedLinear(K, N, 2, (128, 128))
    assert not float8.owns(grouped, type(grouped))


def gguf_linear(kind: str) -> utils.GgufLinear:
    torch.manual_seed(0)
    number = {name: number for number, name in dequant.GGML_NAME.items()}[kind]
    linear = utils.GgufLinear(K, 7, number)
    linear.weight.data = random_gguf(7, K, kind).tensors[0]
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_gguf_has_transformers_numbers(kind, dtype):
    linear = gguf_linear(kind)
    assert gguf.owns(linear, utils.GgufLinear)
    expected = dequant.dequantize(linear.weight, linear.ggml_type, dtype).view(7, K)
    assert torch.equal(gguf.read(linear).weight.dense(dtype), expected)


def test_a_gguf_layer_whose_input_is_permuted():
    linear = gguf_linear("Q8_0")
    linear.input_permutation = torch.randperm(K)
    x = torch.randn(3, K)
    weight = gguf.read(linear).weight.dense(torch.float32)
    torch.testing.assert_close(x @ weight.T, linear._unpack_matmul(x[:, linear.input_permutation]))


def test_unreadable_gguf_layers_have_a_reason():
    linear = gguf_linear("Q4_K")
    linear.ggml_type = dequant.GGML_IQ1_M
    assert "number 29" in gguf.read(linear)
    linear.ggml_type = dequant.GGML_Q6_K
    assert gguf.read(linear).startswith("its blocks are broken: its blocks has shape")
