"""Nested tensors go to PEFT's own forward."""

import peft
import pytest
import torch
from peft_models import counted_calls
from torch import nn

import fastlora


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_a_nested_tensor_is_peft_s(settings, layout):
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    x = torch.nested.nested_tensor([torch.randn(n, 8) for n in (3, 5)], layout=layout)
    torch.manual_seed(0)
    theirs = model(x).to_padded_tensor(0.0)
    fastlora.optimize(model, strict=True)
    torch.manual_seed(0)
    with counted_calls() as calls:
        ours = model(x).to_padded_tensor(0.0)
    assert torch.equal(ours, theirs)
    assert not calls
