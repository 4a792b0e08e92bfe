"""Gated MLPs of PEFT models as fused blocks: training, the report, and changes to their layers."""

import peft
import pytest
import torch
from models import blocks, counted_blocks, tiny_llama
from peft_llama import DATA, ROUNDING, gradients
from peft_models import adapted, assert_same, optimized
from torch import nn

import fastlora
from fastlora.peft.optimize import while_optimized


def model_of(**settings) -> peft.PeftModel:
    settings = {"target_modules": "all-linear", "lora_dropout": 0.1} | settings
    return adapted(tiny_llama(), **settings).double()


def mlps(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".mlp")]


ADAPTERS = {
    "none": {"target_modules": ["q_proj"]},
    "gate": {"target_modules": ["gate_proj"]},
    "up-down": {"target_modules": ["up_proj", "down_proj"]},
    "two-each": {"adapters": ("a", "b")},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_layers_without_an_adapter_and_with_several(settings):
    theirs = model_of(**settings)
    ours = optimized(theirs)
    with counted_blocks() as calls:
        found = gradients(ours)
    assert len(calls) == 2
    assert_same(found, gradients(theirs), ROUNDING)


def test_the_switch_and_the_end_of_with():
    """tests/test_there_and_back.py tests that restore changes everything back."""
    model = model_of()
    fastlora.optimize(model, gated_mlps=False)
    assert not blocks(model)
    report = str(fastlora.coverage(model))
    assert "2 layer by layer" in report
    assert "mlp: left alone (gated_mlps=False)" in report
    with while_optimized(model):
        assert len(blocks(model)) == 2
    assert not blocks(model)


def hook_on_lora_a(model):
    mlps(model)[0].down_proj.lora_A["default"].register_forward_hook(lambda *_: None)


def other_adapter(model, **settings):
    torch.manual_seed(11)
    model.add_adapter("other", peft.LoraConfig(init_lora_weights=False, **settings))
    model.double().set_adapter("other")


def q_proj(model):
    other_adapter(model, target_modules=["q_proj"])


def dora(model):
    other_adapter(model, target_modules=["gate_proj"], use_dora=True)


IDLE = "its adapter is merged, disabled or not active"
LEFT = {  # Values: the change, how many blocks still run fused, and the first block's reason
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), 0, f"its gate_proj: {IDLE}"),
    "one-merged": (lambda model: mlps(model)[0].up_proj.merge(), 1, f"its up_proj: {IDLE}"),
    "other-adapter": (q_proj, 0, IDLE),
    "dora": (dora, 0, "its gate_proj: it is DoRA"),
    "hook-lora_A": (hook_on_lora_a, 1, "its down_proj: a hook watches, or something replaces"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_call_goes_layer_by_layer(name):
    """The numbers after such changes are tested in tests/test_changes.py."""
    change, left, reason = LEFT[name]
    model = optimized(model_of())
    change(model)
    with counted_blocks() as calls:
        model.train()(**DATA)
    assert len(calls) == left
    assert reason in fastlora.coverage(model).gated_mlps[0].reason


def test_a_block_under_fsdp2_s_class():
    """FSDP2 derives a class of its own; optimize and restore work under it in any order."""
    kind = type(mlps(model_of())[0])
    fsdp = torch.distributed.fsdp.FSDPModule
    for before in (True, False):
        model = optimized(model_of()) if before else model_of()
        mlp = mlps(model)[0]
        mlp.__class__ = type(f"FSDP{kind.__name__}", (fsdp, type(mlp)), {})
        fastlora.optimize(model)
        assert len(blocks(model)) == 2
        with counted_blocks() as calls:
            gradients(model)
        assert len(calls) == 2
        fastlora.restore(model)
        assert type(mlp).__bases__ == (fsdp, kind)
