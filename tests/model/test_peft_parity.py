"""PEFT's own layer as the judge: the same outputs, gradients and training."""

from functools import partial

import peft
import pytest
import torch
from models import tiny_llama
from peft_llama import train

import fastlora
from fastlora import LoRAConfig, LoRALinear


def test_ten_training_steps_follow_peft():
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    settings = {"r": 8, "lora_alpha": 16, "target_modules": names}
    torch.manual_seed(2)
    model = tiny_llama().train()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(2)
    plain = tiny_llama().train()
    plain.load_state_dict(base)
    ours = fastlora.apply_lora(plain, LoRAConfig(**settings))
    with torch.no_grad():
        for name, layer in ours.named_modules():
            if isinstance(layer, LoRALinear):
                their = theirs.base_model.model.get_submodule(name)
                layer.lora_A.copy_(their.lora_A["default"].weight)
                layer.lora_B.copy_(their.lora_B["default"].weight)
    adamw = partial(torch.optim.AdamW, lr=1e-2)
    their_losses, our_losses = (
        train(model, adamw, steps=10)["losses"].tolist() for model in (theirs, ours)
    )
    assert their_losses[-1] < their_losses[0] - 0.1
    assert our_losses == pytest.approx(their_losses, rel=1e-4)
