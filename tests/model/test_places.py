"""Modules at two places of a model, where PEFT puts its own at the first one alone."""

import copy

import peft
import pytest
import torch
from models import Mlp, Places, randomise, refused
from torch import nn

import fastlora
from fastlora import LoRAConfig


def places(seed: int = 0) -> Places:
    torch.manual_seed(seed)
    return Places()


def theirs(model: nn.Module, **settings) -> peft.PeftModel:
    return randomise(peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)))


X = torch.randn(3, 8)
REFUSED = {
    "a-layer": ({"target_modules": ["one", "own"]}, "one and other are one Linear"),
    "all": ({"target_modules": "all-linear"}, "one and other are one Linear"),
    "a-weight": ({"target_modules": [], "target_parameters": ["one.weight"]}, "one and other"),
    "in-full": ({"target_modules": ["own"], "modules_to_save": ["one"]}, "one and other"),
    "a-block-in-full": (
        {"target_modules": ["own"], "modules_to_save": ["blocks.0"]},
        "blocks.0 and last, blocks.2 are one Mlp.*Put a copy .* at last, blocks.2",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_mean_what_peft_means_is_refused(settings, message, tmp_path):
    model = places()
    with refused(model, message):
        fastlora.apply_lora(model, LoRAConfig(**settings))
    theirs(places(), **settings).save_pretrained(tmp_path)
    if peft.__version__ == "0.19.0" and "target_parameters" in settings:
        message = "PEFT 0.19.0 saved"
    with refused(model, message):
        fastlora.load_adapter(model, tmp_path)


def test_with_a_copy_at_the_other_place_peft_s_file_means_the_same(tmp_path):
    model = theirs(places(), target_modules=["one", "own"])
    model.save_pretrained(tmp_path)
    ours = places()
    ours.other = copy.deepcopy(ours.one)
    torch.testing.assert_close(fastlora.load_adapter(ours, tmp_path)(X), model(X))


def test_a_place_that_came_later_is_not_saved(tmp_path):
    model = fastlora.apply_lora(Mlp(), LoRAConfig(target_modules=["up"]))
    model.again = model.up
    with refused(model, "up and again are one LoRALinear"):
        fastlora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
