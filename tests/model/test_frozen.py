"""apply_lora takes a model's other frozen layers in, where this CPU multiplies 16 bits slowly."""

import pytest
import torch
from models import (
    Mlp,
    Tied,
    assert_untouched,
    counted_frozen_calls,
    fast_layers,
    randomise,
    snapshot,
    tiny_llama,
)

import fastlora
from fastlora import LoRAConfig
from fastlora.backends import products

pytestmark = pytest.mark.usefixtures("wide")
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def tied(**settings):
    config = LoRAConfig(r=2, target_modules=["mix"])
    return fastlora.apply_lora(Tied().bfloat16(), config, **settings)


def test_the_head_is_fast_tied_and_listed_apart():
    model = tied()
    assert fast_layers(model) == {"head"}
    assert model.head.weight is model.embed.weight
    report = fastlora.coverage(model)
    assert report.frozen == ("head",)
    assert str(report) == (
        "1 of 1 layers fast (backend torch)\n"
        "1 without an adapter: head: in float32, a block of the weight at a time, since this CPU "
        "multiplies 16 bits slowly; attention in 16 bits stays slow, which a float32 model avoids"
    )


def test_frozen_false_and_float32_and_a_fast_cpu_change_nothing(monkeypatch):
    assert fast_layers(tied(frozen=False)) == set()
    assert fast_layers(tied().float()) == {"head"}  # it stays, and calls are torch's
    config = LoRAConfig(r=2, target_modules=["mix"])
    assert fast_layers(fastlora.apply_lora(Tied(), config)) == set()
    monkeypatch.setattr(products, "FORCED", False)
    assert fast_layers(tied()) == set()


def test_what_trains_in_full_is_left_alone():
    config = LoRAConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    model = fastlora.apply_lora(Mlp().bfloat16(), config)
    assert fast_layers(model) == {"down"}
    report = fastlora.coverage(model)
    assert report.frozen == ("down",)
    assert len(report.layers) == 1


def test_remove_lora_gives_them_back():
    model = Tied().bfloat16()
    before = snapshot(model)
    fastlora.apply_lora(model, LoRAConfig(r=2, target_modules=["mix"]))
    assert fastlora.remove_lora(model) is model
    assert_untouched(model, before)
    assert fastlora.coverage(model).frozen == ()


def test_files_load_and_take_them_in(tmp_path):
    fastlora.save_adapter(randomise(tied()), tmp_path)
    model = fastlora.load_adapter(Tied().bfloat16(), tmp_path)
    assert fast_layers(model) == {"head"}
    plain = tied(frozen=False)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)


def test_a_transformers_model_keeps_its_tied_head():
    llama = tiny_llama(torch.bfloat16, tie_word_embeddings=True)
    model = fastlora.apply_lora(llama, LoRAConfig(target_modules="all-linear"))
    assert fast_layers(model) == {"lm_head"}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with counted_frozen_calls() as calls:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(calls) == 1
