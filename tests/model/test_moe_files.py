"""Adapters of the dense layers of a mixture of experts mean the same to PEFT, which rewrites such
configs as it loads them."""

import json
import warnings

import peft
import pytest
import torch
from models import randomise
from moe_models import base_model

import fastlora
from fastlora import LoRAConfig
from fastlora.model.checkpoint import CONFIG

ALL_LINEAR = {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*(experts|gate|router)"}
# PEFT 0.21 says so of patterns for target_parameters, and uses them.
IGNORED = "ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning"
pytestmark = pytest.mark.filterwarnings(IGNORED)


def mixture() -> torch.nn.Module:
    torch.manual_seed(3)
    return base_model("qwen3", mlp_only_layers=[0]).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def test_a_dropout_that_peft_can_t_have_is_warned_of(tmp_path):
    config = LoRAConfig(**ALL_LINEAR, lora_dropout=0.1)
    model = randomise(fastlora.apply_lora(mixture(), config), 0.1).eval()
    with pytest.warns(UserWarning, match=r"lora_dropout 0 in place of 0\.1: PEFT"):
        fastlora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixture(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=2e-6)
    assert fastlora.load_adapter(model, tmp_path).config is model.config
    assert model.model.layers[0].mlp.up_proj.lora_dropout == 0.1


def test_attention_alone_is_spelled_as_ever(tmp_path):
    config = LoRAConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = fastlora.apply_lora(mixture(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert values["target_parameters"] is None
    assert values["lora_dropout"] == 0.1


def test_all_linear_says_that_it_passed_over_experts():
    with pytest.warns(
        UserWarning, match="passed over the parameters of experts and routers"
    ) as found:
        fastlora.apply_lora(mixture(), LoRAConfig(target_modules="all-linear"))
    (message,) = [str(one.message) for one in found if "passed over" in str(one.message)]
    assert "model.layers.1.mlp.experts" in message
    assert "PEFT" in message
    assert found[0].filename == __file__


def test_all_linear_is_silent_about_what_was_excluded():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.apply_lora(mixture(), LoRAConfig(**ALL_LINEAR))
