"""check_adapter: each server's verdicts on small adapters, and mends that compute the same."""

import json
import re
from functools import reduce
from pathlib import Path

import peft
import pytest
import torch
from moe_models import base_model, parameters_of
from peft_models import by_peft, change_config, changes, llama, relative
from process import run_python
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.__main__ import main
from fastlora.adapters.servers.conditions import CONDITIONS
from fastlora.adapters.servers.rules import SERVERS, read_server
from fastlora.model.files import CONFIG, WEIGHTS

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.0."
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 32}
TIED = {"model_type": "llama", "vocab_size": 32}
QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": False}
MOE, MIXTRAL = {"model_type": "qwen3_moe", "num_experts": 2}, {"model_type": "mixtral"}
GPT_OSS, QWEN35 = {"model_type": "gpt_oss"}, {"model_type": "qwen3_5_text"}
HYBRID = {"model_type": "qwen3_5_moe"}


def lora(*names, r=4, dtype=torch.float32, ends=("lora_A.weight", "lora_B.weight")):
    """lora_A and lora_B of layers with 8 in and 8 out features."""
    generator, tensors = torch.Generator().manual_seed(len(names)), {}
    for name in names:
        for end, shape in zip(ends, ((r, 8), (8, r)), strict=False):
            numbers = torch.randn(shape, generator=generator)
            tensors[f"{name}.{end}"] = numbers.to(dtype)
    return tensors


def layers(*lasts, **settings):
    return lora(*(LAYER + last for last in lasts), **settings)


def experts(*lasts, block="mlp"):
    return layers(*(f"{block}.experts.{i}.{last}" for i in range(2) for last in lasts))


def embedding(size=32):
    ends = {"lora_embedding_A": (4, size), "lora_embedding_B": (8, 4)}
    return {f"model.embed_tokens.{end}": torch.ones(shape) for end, shape in ends.items()}


def write(folder, tensors, prefix="base_model.model.", **settings):
    """Write an adapter that has these tensors, and by default q_proj and v_proj as its targets."""
    folder.mkdir()
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    targets = ["q_proj", "v_proj"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
    config |= {"target_modules": targets, "alora_invocation_tokens": None, "lora_bias": False}
    (folder / CONFIG).write_text(json.dumps(config | settings))
    return folder


QV = layers("self_attn.q_proj", "self_attn.v_proj")
ONE = torch.ones(8)
STACKS = layers("mlp.experts", "mlp.experts.base_layer", r=8)
PARAMETERS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SPLIT = ("in_proj_q", "in_proj_k", "in_proj_v")
MLP = ["gate_proj", "up_proj", "down_proj"]


def at(*names):
    return {"target_modules": list(names)}


# Values: tensors, settings, the base's config, and the verdicts of vLLM, SGLang, llama.cpp and PEFT
# other than "loads", on the last parts of names: R rejected, I ignored, U unknown; = as before.
NORM, HEAD = "norm modules_to_save", "lm_head modules_to_save"
BOTH, QKV = "down_proj gate_up_proj", "in_proj_k in_proj_q in_proj_v"
EXPERTS, FUSED = "down_proj gate_proj up_proj", ("qkv_proj", "gate_up_proj")
Q = f"{LAYER}self_attn.q_proj"
CASES = {
    "plain": (QV, {}, LLAMA, "|||"),
    "plain-without-base": (QV, {}, None, "|||"),
    "rslora": (QV, {"use_rslora": True}, LLAMA, "|I use_rslora|=|"),
    "alphas": (QV, {"alpha_pattern": {"v_proj": 2}}, LLAMA, "|I alpha_pattern|=|"),
    "ranks": (
        layers("q_proj") | layers("v_proj", r=2), {"rank_pattern": {"v_proj": 2}}, LLAMA,
        "|R rank_pattern||",
    ),
    "alpha-0": (QV, {"lora_alpha": 0}, LLAMA, "||I lora_alpha|"),
    "rank-32": (layers("q_proj", "v_proj", r=32), {"r": 32}, LLAMA, "R r|||"),
    "dora": (QV | {f"{Q}.lora_magnitude_vector": ONE}, {"use_dora": True}, LLAMA,
             "R q_proj use_dora|=|=|"),
    "lora-bias": (QV | {f"{Q}.lora_B.bias": ONE}, {"lora_bias": True}, LLAMA,
                  "R lora_bias q_proj|I lora_bias q_proj|R q_proj|"),
    "bias": (QV | {f"{Q}.base_layer.bias": ONE}, {"bias": "lora_only"}, LLAMA,
             "R bias q_proj|I bias q_proj|R q_proj|"),
    "other-bias": (QV | {f"{LAYER}mlp.up_proj.bias": ONE}, {}, LLAMA, "R up_proj|=|=|"),
    "saved-head": (QV | {"lm_head.weight": ONE}, {"modules_to_save": ["lm_head"]}, LLAMA,
                   f"R {HEAD}|I {HEAD}|R lm_head|"),
    "saved-score": (QV | {"score.weight": ONE}, {"modules_to_save": ["classifier", "score"]}, LLAMA,
                    "|I modules_to_save score|R score|"),
    "saved-norm": (QV | {"model.norm.weight": ONE}, {"modules_to_save": ["norm"]}, LLAMA,
                   "R modules_to_save norm|I modules_to_save norm|I norm|"),
    "embedding": (embedding() | {"model.embed_tokens.base_layer.weight": ONE}, at("embed_tokens"),
                  LLAMA, "|||"),
    "embedding-without-base": (embedding(), at("embed_tokens"), None, "U embed_tokens|||"),
    "embedding-qwen2": (embedding(), at("embed_tokens"), QWEN2, "R embed_tokens|||"),
    "embedding-resized": (embedding(40), at("embed_tokens"), LLAMA, "R embed_tokens|=|=|="),
    "embedding-untargeted": (embedding(), {}, LLAMA, "|I embed_tokens||"),
    "head": (lora("lm_head") | {"lm_head.base_layer.weight": ONE}, at("lm_head"), LLAMA, "|||"),
    "head-tied": (lora("lm_head"), at("lm_head"), TIED, "||R lm_head|"),
    "head-without-base": (lora("lm_head"), at("lm_head"), None, "U lm_head||U lm_head|"),
    "head-qwen2": (lora("lm_head"), at("lm_head"), QWEN2, "R lm_head|||"),
    "unembed": (lora("unembed_tokens"), at("unembed_tokens"), LLAMA,
                "R unembed_tokens||R unembed_tokens|I unembed_tokens"),
    "other-copy": (QV | {"wte.base_layer.weight": ONE}, {}, LLAMA, "R wte|||"),
    "stacks": (STACKS, PARAMETERS, MOE, f"R {BOTH}|=|=|"),
    "stacks-gpt-oss": (STACKS, PARAMETERS, GPT_OSS, f"|R {BOTH}|=|"),
    "stacks-without-base": (STACKS, PARAMETERS, None, f"U {BOTH}|R {BOTH}|=|"),
    "stacks-only": (STACKS, PARAMETERS | {"target_modules": None}, GPT_OSS,
                    f"|R {BOTH} target_modules|R {BOTH}|"),
    "one-stack": (layers("mlp.experts", r=8), {"target_parameters": ["experts.down_proj"]}, GPT_OSS,
                  "R down_proj|=|=|"),
    "experts": (experts(*MLP), at(*MLP), MOE, "|||"),
    "experts-without-base": (experts(*MLP), at(*MLP), None, f"U {EXPERTS}|||"),
    "experts-incomplete": (experts("down_proj"), at("down_proj"), MOE,
                           "R down_proj|I down_proj|R down_proj|"),
    "experts-untargeted": (experts(*MLP), {}, MOE, f"|I {EXPERTS}||"),
    "experts-hybrid": (experts(*MLP), at(*MLP), HYBRID, f"R {EXPERTS}|||"),
    "experts-mixtral": (experts("w1", "w2", "w3", block="block_sparse_moe"), at("w1", "w2", "w3"),
                        MIXTRAL, "|R w1 w2 w3||"),
    "router-mixtral": (layers("mlp.gate"), at("gate"), MIXTRAL, "I gate|R gate|=|"),
    "router-llama": (layers("mlp.gate"), at("gate"), LLAMA, "R gate|=|=|"),
    "pattern": (QV, {"target_modules": ".*proj"}, LLAMA, "|R target_modules||"),
    "all-linear": (QV, {"target_modules": "all-linear"}, LLAMA, "|||"),
    "q-only": (layers("q_proj"), at("q_proj"), LLAMA, "|R q_proj||"),
    "up-only": (layers("up_proj"), at("up_proj"), LLAMA, "|R up_proj||"),
    "fused": (layers(*FUSED), at(*FUSED), LLAMA,
              "R gate_up_proj qkv_proj||R gate_up_proj qkv_proj|"),
    "fused-without-base": (layers(*FUSED[:1]), at(*FUSED), None, "U qkv_proj||U qkv_proj|"),
    "split": (layers(*SPLIT), at(*SPLIT), QWEN35, f"R {QKV}|=|=|I {QKV}"),
    "delta-net": (layers("in_proj_qkv", "in_proj_z"), at("in_proj_qkv", "in_proj_z"), QWEN35,
                  "|R in_proj_qkv in_proj_z||"),
    "ia3": ({f"{LAYER}k_proj.ia3_l": ONE}, {"peft_type": "IA3"}, LLAMA, "R k_proj peft_type|=|=|"),
    "pissa": (QV, {"init_lora_weights": "pissa_niter_4"}, LLAMA,
              "R init_lora_weights|I init_lora_weights|=|"),
    "alora": (QV, {"alora_invocation_tokens": [1]}, LLAMA,
              "R alora_invocation_tokens|I alora_invocation_tokens||"),
    "unrooted": ({name.removeprefix("model."): tensor for name, tensor in QV.items()}, {}, LLAMA,
                 "I q_proj v_proj||R q_proj v_proj|"),
    "half": (layers("q_proj", "v_proj", ends=["lora_A.weight"]), {}, LLAMA,
             "R q_proj v_proj|=|=|I q_proj v_proj"),
    "other-rank": (layers("q_proj", "v_proj", r=2), {}, LLAMA,
                   "I q_proj v_proj|R q_proj v_proj|I q_proj v_proj|R q_proj v_proj"),
    "integers": (layers("q_proj", "v_proj", dtype=torch.int8), {}, LLAMA, "I q_proj v_proj|=|=|="),
}  # fmt: skip


def base_of(folder, config):
    if config is None:
        return None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def verdicts(report):
    """Every verdict other than "loads", by the last part of the name, as CASES has them."""
    return {(item.rule.verdict[0].upper(), item.last) for item in report.findings if item.rule}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name, tmp_path):
    tensors, settings, config, wanted = CASES[name]
    folder, base = write(tmp_path / "adapter", tensors, **settings), base_of(tmp_path, config)
    before = ""
    for server, text in zip(SERVERS, wanted.split("|"), strict=True):
        before = text = before if text == "=" else text
        verdict, *names = text.split() or [""]
        report = fastlora.check_adapter(folder, server, base)
        assert verdicts(report) == {(verdict, each) for each in names}, server
        assert report.loads == (not text)
        for item in report.findings:
            assert item.rule is None or str(item.rule) in str(report)
        assert len(report.findings) == len(tensors) + len(json.loads((folder / CONFIG).read_text())) + len(
            settings.get("target_modules", "qv") if isinstance(settings.get("target_modules", "qv"), (list, str)) else []
        ) * isinstance(settings.get("target_modules", []), list)


def test_the_option_and_the_forms_of_a_base(tmp_path):
    folder = by_peft(tmp_path / "adapter", target_modules=["q_proj", "v_proj"], r=32)
    llama().config.save_pretrained(tmp_path)
    for base in (llama().config, tmp_path, tmp_path / "config.json"):
        assert not fastlora.check_adapter(folder, "vllm", base).loads
        assert fastlora.check_adapter(folder, "vllm", base, max_lora_rank=32).loads
    assert verdicts(fastlora.check_adapter(folder, "sglang", max_lora_rank=16)) == {("R", "r")}
    report = fastlora.check_adapter(folder, "vllm", fix=tmp_path / "new")  # the option is not its
    assert verdicts(report.fixed) == {("R", "r")}
    for base, error in ((5, TypeError), (tmp_path / "adapter" / CONFIG, ValueError)):
        with pytest.raises(error, match="must"):
            fastlora.check_adapter(folder, "vllm", base)
    with pytest.raises(ValueError, match="must be one of vllm, sglang"):
        fastlora.check_adapter(folder, "ollama")


def test_keys_without_peft_s_prefix(tmp_path):
    folder = write(tmp_path / "adapter", QV, prefix="")
    for server, wanted in zip(SERVERS, (set(), set(), set(), {"q_proj", "v_proj"}), strict=True):
        assert {name for _, name in verdicts(fastlora.check_adapter(folder, server))} == wanted


def tree(names):
    """A model of Linear layers with these names, all zero."""
    model = nn.ModuleDict()
    for name, (out, into) in names.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            module = module[part] if part in module else module.setdefault(part, nn.ModuleDict())
        module[last] = nn.Linear(into, out, bias=False)
    return model


def changes_of(folder):
    """The change of each layer in the file, by PEFT on a model of these layers, in float64."""
    tensors = load_file(folder / WEIGHTS)
    names = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight", "", key): key for key in tensors}
    sizes = {
        name: (len(tensors[key]), tensors[key.replace("lora_B", "lora_A")].shape[1])
        for name, key in names.items()
        if "lora_B" in key
    }

    def base():
        model = tree(sizes)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        return model

    return changes(folder, base)
