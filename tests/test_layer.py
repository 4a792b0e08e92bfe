"""LoRALinear: an nn.Linear in every respect, with an adapter."""

import pytest
import torch
from torch import nn

from fastlora import LoRALinear


def trained_layer(**settings) -> LoRALinear:
    layer = LoRALinear(12, 7, r=4, lora_alpha=6, **settings)
    nn.init.normal_(layer.lora_B)
    return layer


def test_half_an_adapter_in_a_checkpoint_is_an_error():
    layer = trained_layer()
    state = layer.state_dict()
    del state["lora_B"]
    with pytest.raises(RuntimeError, match="lora_B"):
        layer.load_state_dict(state)


def test_is_a_linear_layer():
    layer = LoRALinear(12, 7)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert layer.lora_A.shape == (8, 12)
    assert layer.lora_B.shape == (7, 8)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert "r=8, lora_alpha=16" in repr(layer)


def test_fresh_layer_is_the_identity_change():
    layer, x = LoRALinear(12, 7, lora_dropout=0.5), torch.randn(3, 12)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_initialisation_is_peft_s():
    """kaiming-uniform(a=√5) is uniform within 1/√in_features."""
    lora_a = LoRALinear(400, 7, r=64).lora_A
    assert lora_a.abs().max() <= 1 / 20
    assert lora_a.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_from_linear_shares_the_base():
    linear = nn.Linear(12, 7, dtype=torch.bfloat16).eval()
    layer = LoRALinear.from_linear(linear, r=2, lora_alpha=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.lora_A.dtype == torch.bfloat16
    assert not layer.training


def test_a_base_checkpoint_loads():
    linear, layer = nn.Linear(12, 7), trained_layer()
    adapter = layer.lora_A.detach().clone()
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.lora_A, adapter)
