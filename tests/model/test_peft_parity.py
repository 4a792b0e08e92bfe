"""PEFT's own layer as the judge: the same outputs, gradients and training."""

from functools import partial

import peft
import pytest
import torch
from models import Mlp, tiny_llama
from peft_llama import train

import fastlora
from fastlora import LoRAConfig, LoRALinear

CASES = {
    "f32": (torch.float32, torch.float32, 1e-6),
    "bf16-f32": (torch.bfloat16, torch.float32, 0.02),
    "f16-f32": (torch.float16, torch.float32, 0.003),
}


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize(("dtype", "adapter_dtype", "tolerance"), CASES.values(), ids=CASES)
def test_outputs_and_gradients(dtype, adapter_dtype, tolerance):
    settings = {"r": 4, "lora_alpha": 10, "use_rslora": dtype == torch.float32}
    model = peft.get_peft_model(
        Mlp().to(dtype), peft.LoraConfig(target_modules=["up"], init_lora_weights=False, **settings)
    )
    theirs = model.base_model.model.up
    theirs.lora_A.to(adapter_dtype), theirs.lora_B.to(adapter_dtype)
    ours = LoRALinear.from_linear(theirs.base_layer, **settings)
    ours.lora_A.data = theirs.lora_A["default"].weight.detach().clone()
    ours.lora_B.data = theirs.lora_B["default"].weight.detach().clone()
    x = torch.randn(3, 5, 8, dtype=dtype)
    results = []
    for layer, a, b in (
        (theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
        (ours, ours.lora_A, ours.lora_B),
    ):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        results.append((y, *torch.autograd.grad(y.float().square().mean(), (leaf, a, b))))
    for name, their, our in zip(("y", "d_x", "d_lora_A", "d_lora_B"), *results, strict=True):
        assert our.dtype == their.dtype, name
        assert relative(our.double(), their.double()) < tolerance, name


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
