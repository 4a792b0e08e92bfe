"""transformers' GgufLinear as a packed weight."""

import pytest
import torch
from packed import random_gguf
from transformers.integrations.gguf import dequant
from transformers.integrations.gguf.utils import GgufLinear

from fastlora.formats.gguf import KINDS
from fastlora.quant import gguf as vendor
from fastlora.quant.vendor import PackedLayer

N, K = 7, 512


def quantised(kind: str) -> GgufLinear:
    torch.manual_seed(0)
    number = {name: number for number, name in dequant.GGML_NAME.items()}[kind]
    linear = GgufLinear(K, N, number)
    linear.weight.data = random_gguf(N, K, kind).tensors[0]
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_transformers(kind, dtype):
    linear = quantised(kind)
    assert vendor.owns(linear, GgufLinear)
    found = vendor.read(linear)
    assert isinstance(found, PackedLayer)
    expected = dequant.dequantize(linear.weight, linear.ggml_type, dtype).view(N, K)
    assert torch.equal(found.weight.dense(dtype), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_gguf_s(kind):
    gguf = pytest.importorskip("gguf", reason="gguf isn't installed")
    linear = quantised(kind)
    number = gguf.GGMLQuantizationType[kind]
    expected = torch.from_numpy(gguf.quants.dequantize(linear.weight.numpy(), number))
    assert torch.equal(vendor.read(linear).weight.dense(torch.float32), expected)


def test_a_layer_whose_input_is_permuted(monkeypatch):
    linear = quantised("Q8_0")
    linear.input_permutation = torch.randperm(K)
    x = torch.randn(3, K)
    weight = vendor.read(linear).weight.dense(torch.float32)
    torch.testing.assert_close(x @ weight.T, linear._unpack_matmul(x[:, linear.input_permutation]))


def test_what_no_format_reads_is_said():
    linear = quantised("Q4_K")
    linear.ggml_type = dequant.GGML_IQ1_M
    assert "number 29" in vendor.read(linear)
    linear.ggml_type = dequant.GGML_Q6_K
    assert vendor.read(linear).startswith("its blocks are broken: its blocks has shape")
    with pytest.raises(ValueError, match="GGUF's blocks are read, and not made"):
        vendor.pack(linear, torch.ones(N, K))
