"""Adapters of the dense layers of a mixture of experts mean the same to PEFT, which rewrites such
configs as it loads them."""

import json
import warnings

import peft
import pytest
import torch
from models import randomise, tiny_llama

import fastlora
from fastlora import LoRAConfig
from fastlora.model.checkpoint import CONFIG, WEIGHTS

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "vocab_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "head_dim": 8}
MODELS = {
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]},
    "qwen3_moe-all-dense": {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0, 1]},
    "deepseek_v3": DEEPSEEK,
    "ernie4_5_moe": ERNIE | {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
}
ALL_LINEAR = {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*(experts|gate|router)"}
SETTINGS = {
    "all-linear": ALL_LINEAR,
    "regex": {"target_modules": r"model\.layers\.0\..*(q_proj|down_proj)"},
    "one-projection": {"target_modules": ["down_proj"]},
    "patterns": ALL_LINEAR
    | {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"up_proj": 5}},
}
# Every family, every kind of setting.
CASES = {f"qwen3_moe-{name}": ("qwen3_moe", settings) for name, settings in SETTINGS.items()}
CASES |= {f"{kind}-patterns": (kind, SETTINGS["patterns"]) for kind in MODELS}
CASES["deepseek_v3-one-projection"] = "deepseek_v3", SETTINGS["one-projection"]
# PEFT 0.21 says so of patterns for target_parameters, and uses them.
IGNORED = "ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning"
pytestmark = pytest.mark.filterwarnings(IGNORED)


def make(kind: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind.removesuffix("-all-dense"), **SIZES | MODELS[kind])
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_peft_reads_the_same_model(tmp_path, kind, settings):
    model = randomise(fastlora.apply_lora(make(kind), LoRAConfig(**settings)), 0.1)
    fastlora.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=2e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    for side in ("ours", "theirs"):
        loaded = fastlora.load_adapter(make(kind), tmp_path / side)
        assert torch.equal(logits(loaded), logits(model))
    fastlora.save_adapter(fastlora.load_adapter(make(kind), tmp_path / "ours"), tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "ours" / name).read_bytes()


def test_a_dropout_that_peft_can_t_have_is_warned_of(tmp_path):
    config = LoRAConfig(**ALL_LINEAR, lora_dropout=0.1)
    model = randomise(fastlora.apply_lora(make("qwen3_moe"), config), 0.1).eval()
    with pytest.warns(UserWarning, match=r"lora_dropout 0 in place of 0\.1: PEFT"):
        fastlora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("qwen3_moe"), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=2e-6)
    assert fastlora.load_adapter(model, tmp_path).config is model.config
    assert model.model.layers[0].mlp.up_proj.lora_dropout == 0.1


def test_attention_alone_is_spelled_as_ever(tmp_path):
    config = LoRAConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = fastlora.apply_lora(make("qwen3_moe"), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert values["target_parameters"] is None
    assert values["lora_dropout"] == 0.1


def test_targets_by_their_weights_both_ways(tmp_path):
    """PEFT's target_parameters on a dense model: patterns match the weight's name."""
    settings = {
        "target_modules": ["o_proj"],
        "target_parameters": ["q_proj.weight", "up_proj.weight"],
    }
    settings |= {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj.weight": 5, "o_proj": 2}}
    torch.manual_seed(3)
    base = tiny_llama().state_dict()

    def plain():
        model = tiny_llama()
        model.load_state_dict(base)
        return model

    theirs = randomise(peft.get_peft_model(plain(), peft.LoraConfig(**settings)), 0.1).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastlora.load_adapter(plain(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert ours.model.layers[0].self_attn.q_proj.r == 8  # "q_proj" isn't its weight's name
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs))


def test_all_linear_says_that_it_passed_over_experts():
    with pytest.warns(
        UserWarning, match="passed over the parameters of experts and routers"
    ) as found:
        fastlora.apply_lora(make("qwen3_moe"), LoRAConfig(target_modules="all-linear"))
    (message,) = [str(one.message) for one in found if "passed over" in str(one.message)]
    assert "model.layers.1.mlp.experts" in message
    assert "PEFT" in message
    assert found[0].filename == __file__


def test_all_linear_is_silent_about_what_was_excluded():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.apply_lora(make("qwen3_moe"), LoRAConfig(**ALL_LINEAR))
