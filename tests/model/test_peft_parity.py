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
    "f64": (torch.float64, torch.float64, 1e-12),
    "bf16": (torch.bfloat16, torch.bfloat16, 0.02),
    "bf16-f32": (torch.bfloat16, torch.float32, 0.02),
    "f16-f32": (torch.float16, torch.float32, 0.003),
}


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize(("dtype", "adapter_dtype", "tolerance"), CASES.values(), ids=CASES)
def test_outputs_and_gradients(dtype, adapter_dtype, tolerance, use_rslora):
    settings = {"r": 4, "lora_alpha": 10, "use_rslora": use_rslora}
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


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=["f32", "bf16"]
)
def test_twenty_training_steps_follow_peft(dtype, tolerance):
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    settings = {"r": 8, "lora_alpha": 16, "target_modules": names}
    torch.manual_seed(2)
    model = tiny_llama(dtype).train()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(2)
    plain = tiny_llama(dtype).train()
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
        train(model, adamw, steps=20)["losses"].tolist() for model in (theirs, ours)
    )
    assert their_losses[-1] < their_losses[0] - 0.2
    assert our_losses == pytest.approx(their_losses, rel=tolerance)


def test_dropout_has_peft_s_statistics():
    """The masks differ, so the outputs' mean and variance over many calls are compared."""
    config = peft.LoraConfig(r=4, target_modules=["up"], lora_dropout=0.3, init_lora_weights=False)
    theirs = peft.get_peft_model(Mlp().double(), config).base_model.model.up
    ours = LoRALinear.from_linear(theirs.base_layer, r=4, lora_alpha=8, lora_dropout=0.3)
    ours.lora_A.data, ours.lora_B.data = (
        theirs.lora_A["default"].weight,
        theirs.lora_B["default"].weight,
    )
    x = torch.randn(1, 8, dtype=torch.float64)
    with torch.no_grad():
        rows = x.expand(20000, 8)
        our_y, their_y = ours(rows), theirs(rows)
    deviation = their_y.std(0)
    assert ((our_y.mean(0) - their_y.mean(0)).abs() / deviation).max().item() < 5 * (
        2 / 20000
    ) ** 0.5
    torch.testing.assert_close(our_y.std(0), deviation, rtol=0.05, atol=0)
