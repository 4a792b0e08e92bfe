"""fastlora.pack(model, "int8"): linear layers in 8 bits, their adapters, merges and files."""

import copy

import pytest
import torch
from models import assert_near, numbers, tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fastlora
from fastlora import LoRAConfig
from fastlora.formats import quantized_weight
from fastlora.layers.int8 import Int8Linear, dense_linear
from fastlora.model.targets import numbers_in

F32, BF16 = torch.float32, torch.bfloat16
ONE = "model.safetensors"


def model(dtype=F32, **settings) -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(dtype, hidden_size=128, intermediate_size=192, **settings)


def layers(of: nn.Module) -> list[str]:
    return [name for name, m in of.named_modules() if isinstance(m, Int8Linear)]


def dense(of: nn.Module) -> nn.Module:
    """A dense copy with the packed values."""
    other = copy.deepcopy(of)
    for name in layers(of):
        other.set_submodule(name, dense_linear(of.get_submodule(name)))
    return other


IDS = torch.arange(20)[None]


def logits(of: nn.Module) -> torch.Tensor:
    return of(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_every_linear_layer_but_the_head_is_packed(dtype):
    packed = model(dtype)
    before, count = logits(packed), numbers_in(packed)
    report = fastlora.pack(packed, "int8")
    assert len(report.weights) == len(layers(packed)) == 14
    assert type(packed.lm_head) is nn.Linear
    assert all(w.format == "rotated int8" and 0.001 < w.error < 0.02 for w in report.weights)
    assert report.after < report.before / (2 if dtype == BF16 else 4) * 1.05
    assert numbers_in(packed) == count
    assert_near([logits(packed)], [before], 0.05)
    assert_near([logits(packed)], [logits(dense(packed))], 0.03)
    fastlora.apply_lora(packed, LoRAConfig(target_modules="all-linear"))
    report = str(fastlora.coverage(packed))
    assert "14 of 14 layers fast" in report
    assert "14 quantized: rotated int8" in report
    assert "2 of 2 gated MLPs as one block" in report
    fastlora.remove_lora(packed)
    assert len(layers(packed)) == 14


def test_named_layers_and_the_head():
    packed = model()
    fastlora.pack(packed, "int8", ["lm_head", "q_proj"])
    assert len(layers(packed)) == 3
    fastlora.apply_lora(packed, LoRAConfig(target_modules=["v_proj"]), loss=True)
    assert "loss without logits: lm_head" in str(fastlora.coverage(packed))
    loss = packed.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert torch.isfinite(loss)


def adapted(dtype=F32, bias=True) -> nn.Module:
    torch.manual_seed(0)
    packed = nn.Sequential(nn.Linear(128, 96, bias, dtype=dtype))
    fastlora.pack(packed, "int8", ["0"])
    config = LoRAConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return fastlora.apply_lora(packed, config).eval()


def test_a_merge_without_a_bias_and_a_cast_of_the_model():
    merged, x = adapted(bias=False), torch.randn(5, 128)
    y = merged(x)
    fastlora.merge_lora(merged, requantize=False)
    assert_near([merged(x)], [y], 0.02)
    fastlora.unmerge_lora(merged)
    assert torch.equal(merged(x), y)
    with pytest.warns(UserWarning, match="quantized again"):
        fastlora.merge_lora(merged)
    merged.to(BF16).to(F32)
    fastlora.unmerge_lora(merged)
    assert_near([merged(x)], [y], 0.03)
    fastlora.merge_lora(merged.to(BF16), requantize=False)
    assert merged(x.bfloat16()).dtype == BF16
    fastlora.remove_lora(merged)
    assert type(merged[0]) is nn.Linear
    assert {*merged.state_dict()} == {"0.weight"}
    assert_near([merged(x.bfloat16())], [y], 0.02)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_checkpoint(tmp_path, dtype, device):
    config = model(attention_bias=True).config
    packed = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    fastlora.pack(packed, "int8")
    packed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quant"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device(device):
        other = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert len(fastlora.load_packed(other, tmp_path).weights) == len(layers(other)) == 14
    assert torch.equal(logits(other), logits(packed))
    fastlora.load_packed(other, tmp_path)
    assert torch.equal(logits(other), logits(packed))


def test_reading_the_weight_fails_loudly():
    packed = adapted()
    fastlora.remove_lora(packed)
    with pytest.raises(AttributeError):
        packed[0].weight.data.add_(1)
    broken = copy.deepcopy(packed)
    broken[0].scale = broken[0].scale[:8]
    assert "its int8 weight is broken" in quantized_weight(broken[0])
    assert "Int8Linear(in_features=128, out_features=96, bias=True)" in str(packed)
    assert numbers(packed, torch.randn(3, 128))[0].shape == (3, 96)
