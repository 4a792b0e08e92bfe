"""check_adapter: each server's verdicts on small adapters, and mends that compute the same."""

import json
import re
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from marks import pairwise
from moe_models import parameters_of, parts_of, seeded_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft_models import assert_changes, by_peft, change_tensors, changes, llama
from process import run_python
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.__main__ import main
from fastlora.adapters.servers.rules import CONDITIONS, SERVERS, read_server
from fastlora.packing.files import CONFIG, WEIGHTS

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.0."
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 32}
TIED = {"model_type": "llama", "vocab_size": 32}
QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": False}
MOE, MIXTRAL = {"model_type": "qwen3_moe", "num_experts": 2}, {"model_type": "mixtral"}
GPT_OSS, QWEN35 = {"model_type": "gpt_oss"}, {"model_type": "qwen3_5_text"}
HYBRID = {"model_type": "qwen3_5_moe"}
# Layer 0 is a full one, whose values are its keys.  Layers 2 and 3 have keys of earlier layers.
GEMMA4 = {
    "model_type": "gemma4_text", "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "attention_k_eq_v": True, "layer_types": ["full_attention", "sliding_attention"] * 2,
}  # fmt: skip
GEMMA4_MOE = GEMMA4 | {"num_experts": 2}
GEMMA4_MM = {"model_type": "gemma4", "text_config": GEMMA4}
MISTRAL_MM = {"model_type": "mistral3", "text_config": {"model_type": "mistral"}}


def lora(*names, r=4, dtype=torch.float32):
    """lora_A and lora_B of layers with 8 in and 8 out features."""
    random = torch.Generator().manual_seed(len(names))
    sizes = {"lora_A": (r, 8), "lora_B": (8, r)}
    return {
        f"{name}.{side}.weight": torch.randn(size, generator=random).to(dtype)
        for name in names
        for side, size in sizes.items()
    }


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
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
    config |= {"target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": None}
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


def full(name):
    return QV | {f"{name}.weight": ONE}


def ones(end):
    return {f"{LAYER}self_attn.{last}.{end}": torch.ones(8) for last in ("q_proj", "v_proj")}


def at_layer(number, *lasts):
    return lora(*(f"model.layers.{number}.self_attn.{last}" for last in lasts))


def mounted(tensors, place="model.language_model."):
    """The same tensors of a language model that a multimodal model holds at this place."""
    return {place + name.removeprefix("model."): tensor for name, tensor in tensors.items()}


# Values: tensors, settings, the base's config, and the verdicts of vLLM, SGLang, llama.cpp and PEFT
# other than "loads", on the last parts of names: R rejected, I ignored, U unknown; = as before.
BOTH, EXPERTS, TWO = "down_proj gate_up_proj", "down_proj gate_proj up_proj", "q_proj v_proj"
COPY = {"model.embed_tokens.base_layer.weight": ONE}
SAVED, PISSA, ALORA = "modules_to_save", "init_lora_weights", "alora_invocation_tokens"
TINKER, DORA = "unembed_tokens", {"use_dora": True}
GEMMA_STACKS = layers("experts", "experts.base_layer", r=8)
CONV = {"conv.lora_A.weight": torch.ones(4, 8, 3, 3), "conv.lora_B.weight": torch.ones(8, 4, 1, 1)}
UNLIKE = layers("q_proj") | layers("v_proj", r=2)
ONLY, DOWN = PARAMETERS | {"target_modules": None}, {"target_parameters": ["experts.down_proj"]}
ONE_OF_3, WS, DELTA = experts("down_proj"), ("w1", "w2", "w3"), ("in_proj_qkv", "in_proj_z")
CASES = {
    "plain": (QV, {}, LLAMA, "|||"),
    "rslora": (QV, {"use_rslora": True}, LLAMA, "|I use_rslora|=|"),
    "alphas": (QV, {"alpha_pattern": {"v_proj": 2}}, LLAMA, "|I alpha_pattern|=|"),
    "ranks": (UNLIKE, {"rank_pattern": {"v_proj": 2}}, LLAMA, "|R rank_pattern||"),
    "alpha-0": (QV, {"lora_alpha": 0}, LLAMA, "||I lora_alpha|"),
    "rank-32": (layers("q_proj", "v_proj", r=32), {"r": 32}, LLAMA, "R r|||"),
    "dora": (QV | ones("lora_magnitude_vector"), DORA, LLAMA, f"R use_dora {TWO}|=|=|"),
    "lora-bias": (QV | ones("lora_B.bias"), {"lora_bias": True}, LLAMA,
                  f"R lora_bias {TWO}|I lora_bias {TWO}|R {TWO}|"),
    "bias": (QV | ones("base_layer.bias"), {"bias": "lora_only"}, LLAMA,
             f"R bias {TWO}|I bias {TWO}|R {TWO}|"),
    "other-bias": (QV | {f"{LAYER}mlp.up_proj.bias": ONE}, {}, LLAMA, "R up_proj|=|=|"),
    "saved-head": (full("lm_head"), {SAVED: ["lm_head"]}, LLAMA,
                   f"R lm_head {SAVED}|I lm_head {SAVED}|R lm_head|"),
    "saved-score": (full("score"), {SAVED: ["score"]}, LLAMA, f"|I {SAVED} score|R score|"),
    "norm": (full("norm"), {SAVED: ["norm"]}, LLAMA, f"R {SAVED} norm|I {SAVED} norm|I norm|"),
    "embedding": (embedding() | COPY, at("embed_tokens"), LLAMA, "|||"),
    "embedding-without-base": (embedding(), at("embed_tokens"), None, "U embed_tokens|||"),
    "embedding-qwen2": (embedding(), at("embed_tokens"), QWEN2, "R embed_tokens|||"),
    "embedding-resized": (embedding(40), at("embed_tokens"), LLAMA, "R embed_tokens|=|=|="),
    "head": (lora("lm_head") | {"lm_head.base_layer.weight": ONE}, at("lm_head"), LLAMA, "|||"),
    "head-tied": (lora("lm_head"), at("lm_head"), TIED, "||R lm_head|"),
    "head-without-base": (lora("lm_head"), at("lm_head"), None, "U lm_head||U lm_head|"),
    "unembed": (lora(TINKER), at(TINKER), LLAMA, f"R {TINKER}||R {TINKER}|I {TINKER}"),
    "stacks": (STACKS, PARAMETERS, MOE, f"R {BOTH}|=|=|"),
    "stacks-gpt-oss": (STACKS, PARAMETERS, GPT_OSS, f"|R {BOTH}|=|"),
    "stacks-without-base": (STACKS, PARAMETERS, None, f"U {BOTH}|R {BOTH}|=|"),
    "stacks-only": (STACKS, ONLY, GPT_OSS, f"|R {BOTH} target_modules|R {BOTH}|"),
    "one-stack": (layers("mlp.experts", r=8), DOWN, GPT_OSS, "R down_proj|=|=|"),
    "experts": (experts(*MLP), at(*MLP), MOE, "|||"),
    "experts-without-base": (experts(*MLP), at(*MLP), None, f"U {EXPERTS}|||"),
    "experts-incomplete": (ONE_OF_3, at("down_proj"), MOE, "R down_proj|I down_proj|R down_proj|"),
    "experts-untargeted": (experts(*MLP), {}, MOE, f"|R {EXPERTS}||"),
    "experts-hybrid": (experts(*MLP), at(*MLP), HYBRID, f"R {EXPERTS}|||"),
    "experts-mixtral": (experts(*WS, block="block_sparse_moe"), at(*WS), MIXTRAL, "|R w1 w2 w3||"),
    "router-mixtral": (layers("mlp.gate"), at("gate"), MIXTRAL, "I gate|R gate|=|"),
    "pattern": (QV, {"target_modules": ".*proj"}, LLAMA, "|R target_modules||"),
    "all-linear": (QV, {"target_modules": "all-linear"}, LLAMA, "|||"),
    "untargeted": (QV | layers("o_proj"), {}, LLAMA, "|R o_proj||"),
    "q-only": (layers("q_proj"), at("q_proj"), LLAMA, "|R q_proj||"),
    "up-only": (layers("up_proj"), at("up_proj"), LLAMA, "|R up_proj||"),
    "fused": (layers("gate_up_proj"), at("gate_up_proj"), LLAMA, "R gate_up_proj||R gate_up_proj|"),
    "split": (layers(*SPLIT), at(*SPLIT), QWEN35, "R {0}|=|=|I {0}".format(" ".join(SPLIT))),
    "delta-net": (layers(*DELTA), at(*DELTA), QWEN35, "|R in_proj_qkv in_proj_z||"),
    "ia3": ({f"{LAYER}k_proj.ia3_l": ONE}, {"peft_type": "IA3"}, LLAMA, "R k_proj peft_type|=|=|"),
    "pissa": (QV, {PISSA: "pissa_niter_4"}, LLAMA, f"R {PISSA}|I {PISSA}|=|"),
    "alora": (QV, {ALORA: [1]}, LLAMA, f"R {ALORA}|I {ALORA}||"),
    "unrooted": ({name[6:]: QV[name] for name in QV}, {}, LLAMA, f"I {TWO}|||"),
    "half": ({n: QV[n] for n in QV if "A" in n}, {}, LLAMA, f"R {TWO}|=|=|I {TWO}"),
    "other-rank": (layers("q_proj", "v_proj", r=2), {}, LLAMA,
                   f"I {TWO}|R {TWO}|I {TWO}|R {TWO}"),
    "equal-patterns": (QV, {"rank_pattern": {"q_proj": 4, "x": 2}, "alpha_pattern": {"v_proj": 8}},
                       LLAMA, "|||"),
    "gemma4-values-are-keys": (layers("self_attn.k_proj"), at("k_proj"), GEMMA4_MM,
                               "I k_proj|R k_proj||"),
    "gemma4-keys-alone": (at_layer(1, "k_proj"), at("k_proj"), GEMMA4_MM, "|R k_proj||"),
    "gemma4-reused-keys": (at_layer(2, "k_proj", "v_proj"), at("k_proj", "v_proj"), GEMMA4_MM,
                           "I k_proj v_proj|R k_proj v_proj||"),
    "gemma4-head": (lora("lm_head"), at("lm_head"), GEMMA4, "R lm_head||R lm_head|"),
    "gemma4-stacks": (GEMMA_STACKS, PARAMETERS, GEMMA4_MOE, f"R {BOTH}|=|=|"),
    "mounted-as-trained": (mounted(QV), {}, GEMMA4_MM, "|||"),
    "mounted-and-a-text-model-s": (QV, {}, GEMMA4_MM, "|||"),
    "mounted-and-a-text-base": (mounted(QV), {}, LLAMA, f"I {TWO}|||"),
    "mounted-and-a-mapped-base": (mounted(QV), {}, GEMMA4, "|||"),
    "mounted-before-model": (mounted(QV, "language_model.model."), {}, GEMMA4, f"I {TWO}|||"),
    "tower": (mounted(QV, "model.vision_tower.encoder."), {}, GEMMA4_MM, f"I {TWO}|||"),
    "tower-without-lora": (mounted(QV, "model.vision_tower."), {}, MISTRAL_MM, f"I {TWO}|||"),
    "conv": (CONV, at("conv"), None, "U conv|R conv|U conv|"),
    "compiled": ({f"_orig_mod.{name}": QV[name] for name in QV}, {}, LLAMA,
                 f"I {TWO}||R {TWO}|I {TWO}"),
    "count-list": (QV, {}, LLAMA | {"num_experts": [2, 2]}, "|||"),
    "integers": (layers("q_proj", "v_proj", dtype=torch.int8), {}, LLAMA, f"I {TWO}|=|=|="),
}  # fmt: skip


def base_of(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return config and folder


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
        assert sum(bool(item.key) for item in report.findings) == len(tensors)
        assert all(str(item.rule) in str(report) for item in report.findings if item.rule)


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


def changes_of(folder):
    """The change of each layer in the file, by PEFT on a model of these layers, in float64."""
    tensors = load_file(folder / WEIGHTS)

    def base():
        model = nn.Module()
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            *path, last = key.removeprefix("base_model.model.").split(".")[:-2]
            module = model
            for part in path:
                module = module._modules.setdefault(part, nn.Module())
            sizes = tensors[key].shape[1], len(tensors[key.replace("lora_A", "lora_B")])
            module.add_module(last, nn.Linear(*sizes, bias=False))
        return model

    return changes(folder, base)


assert_same = partial(assert_changes, tolerance=2e-7)
UNEVEN = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"], "r": 6,
    "rank_pattern": {"layers.1.mlp.down_proj": 4}, "alpha_pattern": {"q_proj": 5, "v_proj": -3},
}  # fmt: skip


@pairwise({
    "server": {name: name for name in SERVERS}, "use_rslora": {"": False, "rslora": True},
    "dtype": {"f32": torch.float32, "bf16": torch.bfloat16},
})  # fmt: skip
def test_ranks_and_scales_are_folded(server, use_rslora, dtype, tmp_path):
    folder = by_peft(tmp_path / "adapter", **UNEVEN, use_rslora=use_rslora)
    change_tensors(folder, lambda ts: ts.update((k, t.to(dtype)) for k, t in [*ts.items()]))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = fastlora.check_adapter(folder, server, llama().config, fix=tmp_path / "new" / "one")
    assert report.loads == (server in ("vllm", "peft"))
    assert report.fixed.loads
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one"]
    config = json.loads((tmp_path / "new/one" / CONFIG).read_text())
    assert (config["r"], config["use_rslora"]) == (6, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == json.loads(files[CONFIG])["target_modules"]
    tensors = load_file(tmp_path / "new/one" / WEIGHTS)
    assert {t.shape[0 if "_A" in key else 1] for key, t in tensors.items() if "lora" in key} == {6}
    assert_same(changes(tmp_path / "new/one"), changes(folder))


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt-oss"])
def test_stacks_of_experts_are_split(family, server, tmp_path):
    base = partial(seeded_model, family)
    folder = by_peft(
        tmp_path / "adapter", base(), r=3, lora_alpha=5, target_modules=["o_proj"],
        target_parameters=parameters_of(family), rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.gate_up_proj": 7},
    )  # fmt: skip
    report = fastlora.check_adapter(folder, server, base().config, fix=tmp_path / "new")
    assert report.fixed.loads
    wanted = changes(folder, base)
    if server == "peft" or (server, family) == ("vllm", "gpt-oss"):  # it reads stacks
        assert_same(changes(tmp_path / "new", base), wanted)
        return
    block, names = "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if family == "mixtral" and server != "sglang":
        block, names = "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    experts = {}
    for name, change in wanted.items():
        module, _, last = name.replace(".mlp.", f".{block}.").rpartition(".")
        if last == "weight":
            experts[name] = change
            continue
        for part, each in parts_of(family, last, change).items():
            whole = f"{module}.{{}}.{names[part]}.weight"
            experts |= {whole.format(i): own for i, own in enumerate(each)}
    assert_same(changes_of(tmp_path / "new"), experts)


FUSED = [("split", "vllm", "in_proj_qkv"), ("delta-net", "sglang", "in_proj_qkvz")]


@pytest.mark.parametrize(("name", "server", "whole"), FUSED)
def test_layers_of_one_input_are_fused(name, server, whole, tmp_path):
    tensors, settings, config, _ = CASES[name]
    parts, base = settings["target_modules"], base_of(tmp_path, config)
    folder = write(tmp_path / "adapter", tensors, **settings, alpha_pattern={parts[1]: 3})
    assert fastlora.check_adapter(folder, server, base, fix=tmp_path / "new").fixed.loads
    before = changes_of(folder)
    wanted = torch.cat([before[f"{LAYER}{part}.weight"] for part in parts])
    assert_same(changes_of(tmp_path / "new"), {f"{LAYER}{whole}.weight": wanted})


RENAMED = {
    ("unembed", "vllm"): {TINKER: "lm_head"}, ("unrooted", "vllm"): {"layers": "model.layers"},
    ("router-mixtral", "vllm"): {"mlp": "block_sparse_moe"}, ("pattern", "sglang"): {},
    ("experts-mixtral", "sglang"): {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    ("untargeted", "sglang"): {}, ("mounted-and-a-text-base", "vllm"): {"language_model": None},
    ("mounted-before-model", "vllm"): {"language_model": None},
}  # fmt: skip


@pytest.mark.parametrize(("name", "server"), RENAMED)
def test_names_are_mended(name, server, tmp_path):
    tensors, settings, config, _ = CASES[name]
    folder, base = write(tmp_path / "adapter", tensors, **settings), base_of(tmp_path, config)
    new = RENAMED[name, server]
    report = fastlora.check_adapter(folder, server, base, fix=tmp_path / "new")
    assert report.fixed.loads
    assert str(report).endswith(f"written: {tmp_path / 'new'}: {report.fixed}")
    wanted = {
        ".".join(filter(None, (new.get(part, part) for part in key.split(".")))): tensor
        for key, tensor in load_file(folder / WEIGHTS).items()
    }
    found = load_file(tmp_path / "new" / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(tensor) for key, tensor in wanted.items())


def test_values_that_are_keys_get_a_copy_of_the_adapter(tmp_path):
    tensors = at_layer(0, "k_proj") | at_layer(1, "k_proj")
    folder, base = write(tmp_path / "a", tensors, **at("k_proj")), base_of(tmp_path, GEMMA4)
    report = fastlora.check_adapter(folder, "vllm", base, fix=tmp_path / "new")
    assert report.fixed.loads
    before, found = changes_of(folder), changes_of(tmp_path / "new")
    keys, values = f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.v_proj.weight"
    assert_same(found, before | {values: before[keys]})


@pytest.mark.parametrize(("name", "option"), [("tower", True), ("tower-without-lora", False)])
def test_a_tower_s_adapter_needs_an_option_if_the_model_has_one(name, option, tmp_path):
    tensors, settings, config, _ = CASES[name]
    folder, base = write(tmp_path / "adapter", tensors, **settings), base_of(tmp_path, config)
    text = str(fastlora.check_adapter(folder, "vllm", base))
    assert ("--enable-tower-connector-lora" in text) == option
    assert ("Merge the adapter" in text) != option


def test_a_mended_pattern_targets_the_same_layers(tmp_path):
    """Further training of the mended adapter must not add layers that the pattern excluded."""
    pattern = r".*\.layers\.0\.self_attn\.[qv]_proj"
    folder = write(tmp_path / "adapter", QV, target_modules=pattern)
    report = fastlora.check_adapter(
        folder, "sglang", base_of(tmp_path, LLAMA), fix=tmp_path / "new"
    )
    assert report.fixed.loads
    config = peft.LoraConfig.from_pretrained(tmp_path / "new")
    names = [f"model.layers.{i}.self_attn.{last}_proj" for i in range(2) for last in "qkv"]
    found = [name for name in names if check_target_module_exists(config, name)]
    assert found == [name for name in names if re.fullmatch(pattern, name)]


def test_nothing_is_written_if_a_part_can_t_be_mended(tmp_path):
    folder = write(tmp_path / "adapter", STACKS, **PARAMETERS, modules_to_save=["lm_head"])
    report = fastlora.check_adapter(folder, "sglang", fix=tmp_path / "deep" / "new")
    assert "nothing was written: --fix can't mend modules_to_save" in str(report)
    tensors, settings, config, _ = CASES["delta-net"]
    half = {name: tensor for name, tensor in tensors.items() if "_z" not in name}  # no size of z
    folder, base = write(tmp_path / "half", half, **settings), base_of(tmp_path, config)
    report = fastlora.check_adapter(folder, "sglang", base, fix=tmp_path / "new")
    assert "nothing was written: mended, sglang" in str(report)
    (tmp_path / "file").write_text("mine")
    for place in (folder, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="exists: give a new folder"):
            fastlora.check_adapter(folder, "peft", fix=place)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "half", "file", "config.json"}


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_peft(tmp_path / "a", **UNEVEN)
    llama().config.save_pretrained("base")
    call = ["check-adapter", "a", "--base", "base/config.json", "--for"]
    assert main([*call, "vllm"]) == 0
    assert capsys.readouterr().out == f"{fastlora.check_adapter('a', 'vllm', 'base')}\n"
    assert main([*call, "vllm", "--max-lora-rank", "4"]) == 1
    assert main([*call, "sglang"]) == 1
    assert "ignored: alpha_pattern: all layers have the scale" in capsys.readouterr().out
    assert main([*call, "sglang", "--fix", "b"]) == 0
    assert "written: b: sglang 0.5.23 loads the whole adapter" in capsys.readouterr().out
    missing = ["check-adapter", "c", "--for", "peft"]
    for wrong, code in (([*call, "ollama"], 2), (call[:2], 2), (missing, 1)):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == code


def test_an_import_of_fastlora_does_not_read_the_rules():
    text = "import sys, fastlora; print([name for name in sys.modules if 'serv' in name])"
    assert "fastlora.adapters" not in run_python("-c", text)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastlora.nothing  # noqa: B018


@pytest.mark.parametrize("name", SERVERS)
def test_the_page_has_every_server_s_files(name):
    server, page = read_server(name), (ROOT / "docs/deploy.md").read_text()
    assert all(rule.when.keys() <= CONDITIONS.keys() for rule in server.rules)
    [line] = re.findall(rf"^\| {name} {server.version} \| (.*) \|$", page, re.M)
    assert set(re.findall("`(.*?)`", line)) == {rule.source for rule in server.rules}
    assert f"https://github.com/{server.repository}" in page
