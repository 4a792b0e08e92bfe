"""Files that PEFT users have: other first values, chosen layers, output heads, new tokens."""

import json

import peft
import pytest
import torch
from models import adapt, randomise, refused, tiny_llama
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import LoRAConfig
from fastlora.model.checkpoint import WEIGHTS

EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
HEAD_BASE = "base_model.model.lm_head.base_layer.weight"


def llama(**settings) -> torch.nn.Module:
    torch.manual_seed(3)
    return tiny_llama(num_hidden_layers=3, **settings)


@pytest.fixture(params=[False, True], ids=["", "tied"])
def base(request, tmp_path_factory):
    """A function that loads the same base model from its files again, with more tokens."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    llama(tie_word_embeddings=request.param).save_pretrained(folder)

    def load(tokens: int = 100, seed: int = 0) -> torch.nn.Module:
        model = LlamaForCausalLM.from_pretrained(folder).eval()
        torch.manual_seed(seed)
        if tokens != 100:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        return model

    return load


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(100)[None, -12:]).logits


def saved_by_peft(model: torch.nn.Module, folder, settings: dict, **how) -> torch.nn.Module:
    theirs = randomise(peft.get_peft_model(model, peft.LoraConfig(**settings)), 0.1).eval()
    theirs.save_pretrained(folder, **how)
    return theirs


@pytest.mark.parametrize("targets", ["all-linear", ".*q_proj"])
def test_chosen_layers_need_a_list(targets):
    with pytest.raises(ValueError, match=r"layers_to_transform is \(1,\) and target_modules"):
        LoRAConfig(target_modules=targets, layers_to_transform=1)


def test_trained_biases_that_peft_left_out_are_named(tmp_path):
    saved_by_peft(llama(attention_bias=True), tmp_path, {"target_modules": ["q_proj"]})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bias": "lora_only"}))
    with refused(llama(attention_bias=True), "PEFT before 0.21 leaves trained biases"):
        fastlora.load_adapter(llama(attention_bias=True), tmp_path)


def test_first_values_that_leave_the_base_alone(tmp_path):
    settings = {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}
    theirs = saved_by_peft(llama(), tmp_path, settings)
    torch.testing.assert_close(logits(fastlora.load_adapter(llama(), tmp_path)), logits(theirs))


def test_a_file_without_an_adapter_is_named(tmp_path):
    saved_by_peft(llama(), tmp_path, {"target_modules": ["q_proj"]})
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / WEIGHTS)
    for model in (llama(), adapt(llama(), lora_alpha=8, target_modules=["q_proj"])):
        with refused(model, "has no lora_A and no lora_B: it holds no adapter"):
            fastlora.load_adapter(model, tmp_path)


def test_another_output_head_in_the_file_is_warned_of(tmp_path):
    settings = {"target_modules": ["lm_head"]}
    saved_by_peft(llama(), tmp_path, settings)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {HEAD_BASE: tensors[HEAD_BASE] + 1}, tmp_path / WEIGHTS)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.warns(UserWarning, match=r"lm_head.base_layer.weight with other values"):
        ours = fastlora.load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))
    fastlora.save_adapter(ours, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert torch.equal(again[HEAD_BASE], tensors[HEAD_BASE] + 1)


def test_a_vocabulary_of_the_same_size_is_not_saved(base, tmp_path):
    model = fastlora.apply_lora(base(), LoRAConfig(target_modules=["q_proj"]))
    fastlora.save_adapter(model, tmp_path / "auto")
    assert not {EMBED, HEAD} & load_file(tmp_path / "auto" / WEIGHTS).keys()
    fastlora.save_adapter(model, tmp_path / "asked", save_embedding_layers=True)
    assert {EMBED, HEAD} < load_file(tmp_path / "asked" / WEIGHTS).keys()


def test_new_tokens_stay_out_if_asked(base, tmp_path):
    model = fastlora.apply_lora(base(104), LoRAConfig(target_modules=["q_proj"]))
    fastlora.save_adapter(model, tmp_path, save_embedding_layers=False)
    assert not {EMBED, HEAD} & load_file(tmp_path / WEIGHTS).keys()
    with pytest.raises(ValueError, match="save_embedding_layers is 'yes'"):
        fastlora.save_adapter(model, tmp_path, save_embedding_layers="yes")


def test_a_model_without_the_new_tokens(base, tmp_path):
    model = fastlora.apply_lora(base(104), LoRAConfig(target_modules=["q_proj", "lm_head"]))
    fastlora.save_adapter(model, tmp_path)
    plain = base()
    with refused(plain, r"resize_token_embeddings\(104\) first"):
        fastlora.load_adapter(plain, tmp_path)


def test_a_base_that_is_gone_is_said(tmp_path):
    import shutil

    from transformers import LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    fastlora.apply_lora(model, LoRAConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="can't read the config in .* save_embedding_layers=True"):
        fastlora.save_adapter(model, tmp_path / "adapter")
