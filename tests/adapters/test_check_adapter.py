"""check_adapter: each server's verdicts on small adapters, and mends that compute the same."""

import json
import re
from pathlib import Path

import pytest
import torch
from moe_models import base_model, parameters_of
from peft_models import by_peft, change_tensors, changes, llama, relative
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
Q, V = f"{LAYER}self_attn.q_proj", f"{LAYER}self_attn.v_proj"
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
    "lora-bias": (QV | {f"{name}.lora_B.bias": ONE.clone() for name in (Q, V)}, {"lora_bias": True}, LLAMA,
                  "R lora_bias q_proj v_proj|I lora_bias q_proj v_proj|R q_proj v_proj|"),
    "bias": (QV | {f"{name}.base_layer.bias": ONE.clone() for name in (Q, V)}, {"bias": "lora_only"}, LLAMA,
             "R bias q_proj v_proj|I bias q_proj v_proj|R q_proj v_proj|"),
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
    "experts-untargeted": (experts(*MLP), {}, MOE, f"|R {EXPERTS}||"),
    "untargeted": (QV | layers("o_proj"), {}, LLAMA, "|R o_proj||"),
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
        model = nn.ModuleDict()
        for key in tensors:
            if key.endswith(".lora_A.weight"):
                *path, last = key.removeprefix("base_model.model.").split(".")[:-2]
                module = model
                for part in path:
                    if part not in module:
                        module[part] = nn.ModuleDict()
                    module = module[part]
                sizes = tensors[key].shape[1], len(tensors[key.replace("lora_A", "lora_B")])
                module[last] = nn.Linear(*sizes, bias=False)
        return model.apply(lambda part: [nn.init.zeros_(p) for p in part.parameters(False)])

    return changes(folder, base)


def assert_same(found, wanted, tolerance=2e-7):
    assert found.keys() == wanted.keys()
    assert all(relative(found[name], wanted[name]) < tolerance for name in wanted)


UNEVEN = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"], "r": 6, "lora_alpha": 9,
    "rank_pattern": {"layers.1.mlp.down_proj": 4}, "alpha_pattern": {"q_proj": 5, "v_proj": -3},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("server", SERVERS)
def test_ranks_and_scales_are_folded(server, use_rslora, dtype, tmp_path):
    folder = by_peft(tmp_path / "adapter", **UNEVEN, use_rslora=use_rslora)
    change_tensors(
        folder, lambda tensors: tensors.update((k, t.to(dtype)) for k, t in [*tensors.items()])
    )
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


def halves(family, fused):
    """Gate and up of experts' weights: the halves of the rows, or every second row."""
    if family == "gpt-oss":
        return fused[:, ::2], fused[:, 1::2]
    return fused.chunk(2, dim=1)


@pytest.mark.parametrize(
    ("family", "server"),
    [("qwen3", server) for server in SERVERS]
    + [("mixtral", server) for server in SERVERS]
    + [("gpt-oss", server) for server in SERVERS],
)
def test_stacks_of_experts_are_split(family, server, tmp_path):
    def base():
        torch.manual_seed(3)
        return base_model(family)

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
    block, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if family == "mixtral" and server != "sglang":
        block, names = "block_sparse_moe", ("w1", "w3", "w2")
    experts = {}
    for name, change in wanted.items():
        module, _, last = name.replace(".mlp.", f".{block}.").rpartition(".")
        if last == "weight":
            experts[name] = change
            continue
        change = change.mT if family == "gpt-oss" else change  # [E, in, out]
        parts = halves(family, change) if last == "gate_up_proj" else [change]
        for part, each in zip(names if parts[1:] else names[2:], parts, strict=False):
            experts |= {f"{module}.{i}.{part}.weight": own for i, own in enumerate(each)}
    assert_same(changes_of(tmp_path / "new"), experts)


@pytest.mark.parametrize(
    ("tensors", "server", "whole", "parts"),
    [
        (lora(*(f"{LAYER}{name}" for name in SPLIT)), "vllm", "in_proj_qkv", SPLIT),
        (
            layers("in_proj_qkv", "in_proj_z"),
            "sglang",
            "in_proj_qkvz",
            ("in_proj_qkv", "in_proj_z"),
        ),
    ],
    ids=["vllm", "sglang"],
)
def test_layers_of_one_input_are_fused(tensors, server, whole, parts, tmp_path):
    settings = at(*parts) | {"alpha_pattern": {parts[1]: 3}}
    folder, base = write(tmp_path / "adapter", tensors, **settings), base_of(tmp_path, QWEN35)
    assert fastlora.check_adapter(folder, server, base, fix=tmp_path / "new").fixed.loads
    before = changes_of(folder)
    wanted = torch.cat([before[f"{LAYER}{part}.weight"] for part in parts])
    assert_same(changes_of(tmp_path / "new"), {f"{LAYER}{whole}.weight": wanted})


@pytest.mark.parametrize(
    ("name", "server", "old", "new"),
    [
        ("unembed", "vllm", "unembed_tokens", "lm_head"),
        ("unrooted", "vllm", "layers", "model.layers"),
        (
            "experts-mixtral",
            "sglang",
            r"w1|w2|w3",
            {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
        ),
        ("router-mixtral", "vllm", r"mlp", "block_sparse_moe"),
        ("pattern", "sglang", "x", "x"),
        ("untargeted", "sglang", "x", "x"),
    ],
)
def test_names_are_mended(name, server, old, new, tmp_path):
    tensors, settings, config, _ = CASES[name]
    folder, base = write(tmp_path / "adapter", tensors, **settings), base_of(tmp_path, config)
    report = fastlora.check_adapter(folder, server, base, fix=tmp_path / "new")
    assert report.fixed.loads
    assert str(report).endswith(f"written: {tmp_path / 'new'}: {report.fixed}")
    wanted = {
        re.sub(old, lambda found: new[found[0]] if isinstance(new, dict) else new, key): tensor
        for key, tensor in load_file(folder / WEIGHTS).items()
    }
    found = load_file(tmp_path / "new" / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(tensor) for key, tensor in wanted.items())


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
    for wrong, code in (
        ([*call, "ollama"], 2),
        (call[:2], 2),
        (["check-adapter", "c", "--for", "peft"], 1),
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == code


def test_an_import_of_fastlora_does_not_read_the_rules():
    text = "import sys, fastlora; print([name for name in sys.modules if 'serv' in name])"
    assert "fastlora.adapters" not in run_python("-c", text)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastlora.nothing  # noqa: B018


@pytest.mark.parametrize("name", SERVERS)
def test_the_page_has_every_rule(name):
    """As a line of the table, with the server's version and the rule's file."""
    server, page = read_server(name), (ROOT / "docs/adapters.md").read_text()
    section = page.split(f"### {name} {server.version}\n")[1].split("\n##")[0]
    assert f"https://github.com/{server.repository}" in section
    for rule in server.rules:
        assert rule.when.keys() <= CONDITIONS.keys()
        line = f"| {rule.verdict} | {rule.says} | `{rule.source}` | {rule.todo}"
        assert line in section
    assert section.count("\n| ") == len(server.rules) + 1
