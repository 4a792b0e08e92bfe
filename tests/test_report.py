"""coverage(model): a record for each adapted layer, and a short report, also for PEFT's layers."""

import re

import peft
import pytest
import torch
from models import Mlp
from torch import nn

import fastlora


def adapted():
    model = Mlp()
    fastlora.replace_linears(model, ["up", "down"], r=4, lora_alpha=8)
    return model


def test_every_adapted_layer_has_a_record():
    report = fastlora.coverage(adapted())
    assert [
        (layer.name, layer.shape, layer.r, layer.fast, layer.plan) for layer in report.layers
    ] == [("up", (12, 8), 4, True, "torch"), ("down", (8, 12), 4, True, "torch")]
    assert str(report) == "2 of 2 layers fast (backend torch)"
    assert report.not_fast == ()


def test_a_merged_layer_says_so():
    model = adapted()
    for layer in (model.up, model.down):
        layer.merge()
    report = fastlora.coverage(model)
    assert {layer.plan for layer in report.layers} == {"merged"}
    assert str(report) == "2 of 2 layers fast (2 merged)"


def test_a_replaced_forward_is_eager_with_its_reason():
    model = adapted()
    model.up.forward = lambda x: x
    report = fastlora.coverage(model)
    assert [layer.name for layer in report.not_fast] == ["up"]
    assert str(report) == (
        "1 of 2 layers fast, 50 % of the adapted parameters (backend torch)\n"
        "1 not fast: up: its forward was replaced on the instance, so fastlora's forward isn't "
        "called"
    )


def test_a_layer_that_the_kernels_do_not_cover_says_why():
    model = adapted()
    model.up.double()
    with fastlora.use_backend("triton"):
        report = fastlora.coverage(model)
    assert [layer.plan for layer in report.layers] == ["torch", "triton"]
    assert str(report) == (
        "2 of 2 layers fast (backend torch; backend triton)\n"
        "1 on torch: up: the Triton kernels don't have torch.float64"
    )


def test_the_share_of_adapted_parameters_counts_experts():
    experts = nn.Module()  # eight experts in one parameter, and a router beside them
    experts.router = nn.Linear(8, 8, bias=False)
    experts.up_proj = nn.Parameter(torch.ones(8, 16, 8))
    config = peft.LoraConfig(target_modules=["router"], target_parameters=["experts.up_proj"])
    model = peft.get_peft_model(nn.ModuleDict({"experts": experts}), config)
    report = fastlora.coverage(fastlora.optimize(model))
    assert {layer.parameters for layer in report.layers} == {8 * 8, 8 * 16 * 8}
    assert report.share == 64 / (64 + 1024)
    first, *rest = str(report).splitlines()
    assert first == "1 of 2 layers fast, 6 % of the adapted parameters (backend torch)"
    assert "its forward isn't that of transformers' use_experts_implementation" in rest[0]
    assert "ParamWrapper" not in str(report)


# Layers that are never called.


def encoder_layer(*targets: str, **settings) -> peft.PeftModel:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **settings)
    config = peft.LoraConfig(target_modules=list(targets), init_lora_weights=False)
    return peft.get_peft_model(nn.Sequential(layer), config)


def without_adapter(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with model.disable_adapter():
        return model(x)


def test_out_proj_of_torch_s_attention_is_said_not_to_be_called():
    model, x = encoder_layer("out_proj"), torch.randn(2, 3, 8)
    assert torch.equal(model(x), without_adapter(model, x))
    report = fastlora.coverage(fastlora.optimize(model))
    assert report.fast == ()
    assert "out_proj: nothing calls it: torch.nn.MultiheadAttention reads its weight" in str(report)
    assert torch.equal(model(x), without_adapter(model, x))
    with pytest.raises(ValueError, match="nothing calls it"):
        fastlora.optimize(model, strict=True)


DOUBTS = {
    "alpha": ({"lora_alpha": 0}, "base_model.model.0: the scaling is 0 (lora_alpha), so"),
    "dropout": ({"lora_dropout": -0.1}, "lora_dropout of default is -0.1, which PEFT takes for 0"),
    "rank": ({"r": 9}, "base_model.model.0: r is 9, above both sizes of the layer: rank 4 can"),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_settings_that_peft_accepts_in_silence_are_a_warning_and_a_note(name):
    settings, text = DOUBTS[name]
    config = peft.LoraConfig(target_modules=["0"], **settings)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    with pytest.warns(UserWarning, match=re.escape(text)):
        fastlora.optimize(model)
    assert text in str(fastlora.coverage(model))


@pytest.mark.parametrize("settings", [{"lora_alpha": 0}, {"r": 9}], ids=["alpha", "rank"])
def test_doubtful_settings_of_a_layer_are_a_warning(settings):
    with pytest.warns(UserWarning, match="the scaling is 0|r is 9, above both sizes"):
        fastlora.LoRALinear(4, 8, **settings)


@pytest.mark.parametrize("sizes", [(), (4, 8)])
def test_a_layer_s_unknown_argument_names_the_one_to_use(sizes):
    with pytest.raises(TypeError, match=r"LoRALinear has no 'rank': its arguments are .*, r, "):
        fastlora.LoRALinear(*sizes, rank=4)
