"""load_state_dict of a model with adapters, of what transformers saves too."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from models import Mlp, adapt, randomize, tiny_llama
from moe_models import MODELS, base_model, parameters_of
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora import LoRAConfig

FULL = {"mixtral": ["mlp.gate"], "nemotron": ["norm_f"], "qwen3": ["lm_head"]}


def adapted(name: str, seed: int, **settings) -> nn.Module:
    model = base_model(name)
    torch.manual_seed(seed)
    settings = {"target_modules": "all-linear", "target_parameters": parameters_of(name)} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what "all-linear" leaves out
        return randomize(fastlora.apply_lora(model, LoRAConfig(r=2, **settings)))


def saved(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """As transformers.Trainer's checkpoint has it."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    pairs = trained(expected)
    assert trained(got).keys() == pairs.keys()
    assert all(torch.equal(value, pairs[name]) for name, value in trained(got).items())


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_under_its_names_comes_back(name, tmp_path, no_warning):
    full = {"modules_to_save": FULL.get(name)}
    model, other = adapted(name, 1, **full), adapted(name, 2, **full)
    state = saved(model, tmp_path)
    keys = set(state)
    assert (trained(model).keys() <= keys) != (name in ("mixtral", "nemotron"))
    other.load_state_dict(state, strict=False)
    assert_same(other, model)
    assert set(state) == keys


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_reads_them_too_and_a_plain_model_doesn_t(copied, tmp_path, no_warning):
    model, other = adapted("mixtral", 1), copied(adapted("mixtral", 2))
    state = saved(model, tmp_path)
    other.load_state_dict(state, strict=False)
    assert_same(other, model)
    fastlora.remove_lora(other)
    assert not other._load_state_dict_pre_hooks
    other.load_state_dict(base_model("mixtral").state_dict())


def test_a_model_of_images_and_text_comes_back(tmp_path, no_warning):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text = sizes | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20}
    vision = sizes | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    parts = {"text_config": text | {"model_type": "llama"}}
    parts |= {"vision_config": vision | {"model_type": "clip_vision_model"}}
    config = transformers.LlavaConfig(**parts, image_token_index=19)
    kind = transformers.LlavaForConditionalGeneration
    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model, other = (adapt(kind(copy.deepcopy(config)), **settings) for _ in range(2))
    state = saved(model, tmp_path)
    assert not trained(model).keys() <= state.keys()
    if transformers.__version__.startswith("4."):  # which renames in no function of its own
        with pytest.raises(RuntimeError, match="AdapterTrainer"):
            other.load_state_dict(state, strict=False)
        return
    other.load_state_dict(state, strict=False)
    assert_same(other, model)


def test_adapters_under_names_that_nobody_knows_are_refused():
    model, other = (adapt(Mlp(), r=2, target_modules=["up", "down"]) for _ in range(2))
    before = trained(other)
    state = {f"inner.{k}" if "down" in k else k: v for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"down\.lora_A.*has inner\.down\.lora_A.*AdapterTrain"):
        other.load_state_dict(state, strict=False)
    assert torch.equal(other.down.lora_A, before["down.lora_A"])


def test_experts_that_train_in_full_and_are_saved_in_parts_are_refused(tmp_path):
    settings = {"target_parameters": None, "target_modules": ["q_proj"]}
    settings |= {"modules_to_save": ["mlp.experts"]}
    model, other = adapted("qwen3", 1, **settings), adapted("qwen3", 2, **settings)
    message = r"experts\.gate_up_proj.*has .*experts\.0\.down_proj.weight.*AdapterTrainer"
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(saved(model, tmp_path), strict=False)


def test_what_is_missing_is_warned_of():
    model, other = (adapt(Mlp(), r=2, target_modules=["up", "down"]) for _ in range(2))
    state = model.state_dict()
    del state["down.lora_A"]
    with pytest.warns(UserWarning, match=r"down\.lora_A are not in this state dict, and keep"):
        other.load_state_dict(state, strict=False)
    base = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    with pytest.warns(UserWarning, match=r"all adapters of the model are not in .*a base model's"):
        assert not any(other.load_state_dict(base))


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.ModuleDict({"inner": m})])
def test_one_of_its_own_is_loaded_as_it_is(around, no_warning):
    model, other = (adapt(tiny_llama(), target_modules=["q_proj"]) for _ in range(2))
    around(other).load_state_dict(around(model).state_dict())
    assert_same(other, model)
