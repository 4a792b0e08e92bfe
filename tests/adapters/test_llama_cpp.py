"""export_gguf: the file read by gguf and applied as in llama.cpp, against the changes by PEFT."""

import json
from functools import partial

import pytest
import torch
from moe_models import parameters_of, parts_of, seeded_model
from peft_models import by_peft, changes, llama, relative

import fastlora

gguf = pytest.importorskip("gguf", reason="needs the gguf package")


def read(path):
    """The file's metadata and its tensors, in float64 and with numpy's shapes."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return fields, {name: tensor.double() for name, tensor in tensors.items()}


def product(fields, tensors, name):
    """The change that llama.cpp adds to this weight; its scale is alpha / lora_b's own rank."""
    lora_a, lora_b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    return fields["adapter.lora.alpha"] / lora_b.shape[-1] * (lora_b @ lora_a)


def permuted(weight, heads):
    """Reorder each head's rows: llama.cpp's rotary embedding pairs 2i with 2i + 1."""
    rows = torch.arange(len(weight)).view(heads, -1)
    half = rows.shape[1] // 2
    return weight[torch.stack([rows[:, :half], rows[:, half:]], dim=2).flatten()]


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
def test_a_llama(use_rslora, tmp_path):
    folder = by_peft(
        tmp_path / "adapter", r=6, lora_alpha=9, use_rslora=use_rslora,
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"],
        rank_pattern={"layers.1.mlp.down_proj": 4}, alpha_pattern={"q_proj": 5},
    )  # fmt: skip
    fastlora.export_gguf(folder, tmp_path / "lora.gguf", model_config=llama().config)
    fields, tensors = read(tmp_path / "lora.gguf")
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 9.0
    wanted = changes(folder)
    called = {"self_attn.q": "attn_q", "self_attn.k": "attn_k", "self_attn.v": "attn_v"}
    count = 1
    for name, change in wanted.items():
        if name == "lm_head.weight":
            found = product(fields, tensors, "output.weight")
        else:
            _, _, block, part, proj, _ = name.split(".")
            own = called.get(f"{part}.{proj[0]}", "ffn_down")
            found = product(fields, tensors, f"blk.{block}.{own}.weight")
            heads = {"attn_q": 4, "attn_k": 2}.get(own)
            change = permuted(change, heads) if heads else change
            count += 1
        assert relative(found, change) < 1e-6, name
    assert len(tensors) == 2 * count == 2 * 9


def test_an_architecture_that_needs_only_new_names(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)

    def base():
        torch.manual_seed(3)
        return Qwen2ForCausalLM(config)

    folder = by_peft(tmp_path / "adapter", base(), target_modules=["q_proj"])
    config.save_pretrained(tmp_path / "base")
    fastlora.export_gguf(folder, tmp_path / "lora.gguf", model_config=tmp_path / "base")
    fields, tensors = read(tmp_path / "lora.gguf")
    assert fields["general.architecture"] == "qwen2"
    (change,) = changes(folder, base).values()
    assert relative(product(fields, tensors, "blk.0.attn_q.weight"), change) < 1e-6


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt-oss"])
def test_experts_are_taken_apart(family, tmp_path):
    base = partial(seeded_model, family)
    folder = by_peft(
        tmp_path / "adapter", base(), r=3, lora_alpha=5, target_modules=["o_proj"],
        target_parameters=parameters_of(family),
    )  # fmt: skip
    fastlora.export_gguf(folder, tmp_path / "lora.gguf", model_config=base().config)
    found, wanted = read(tmp_path / "lora.gguf"), changes(folder, base)
    for name, change in wanted.items():
        block, _, last = name.removeprefix("model.layers.").partition(".mlp.experts.")
        if last:
            for part, own in parts_of(family, last, change).items():
                assert relative(product(*found, f"blk.{block}.ffn_{part}_exps.weight"), own) < 1e-6
    assert len([name for name in wanted if "experts" in name]) == 4


@pytest.mark.parametrize(
    ("dtype", "r", "kinds", "error"),
    [
        ("f16", 6, {"a": "F16", "b": "F16"}, 1e-3),
        ("q8_0", 32, {"a": "Q8_0", "b": "Q8_0"}, 2e-2),
        ("q8_0", 6, {"a": "Q8_0", "b": "F16"}, 2e-2),  # rows of 6 are no blocks of 32
    ],
)
def test_dtypes(dtype, r, kinds, error, tmp_path):
    folder = by_peft(tmp_path / "adapter", r=r, target_modules=["v_proj"])
    path = tmp_path / "lora.gguf"
    fastlora.export_gguf(folder, path, model_config=llama().config, dtype=dtype)
    tensors = gguf.GGUFReader(path).tensors
    assert {tensor.name[-1]: tensor.tensor_type.name for tensor in tensors} == kinds
    (change, _) = changes(folder).values()
    assert 1e-6 < relative(product(*read(path), "blk.0.attn_v.weight"), change) < error


NO_HEADS = {"num_attention_heads": 3, "hidden_size": None}


BAD = {
    "bias": ({"modules_to_save": ["norm"]}, {}, "can't hold trained biases, modules_to_save"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, {}, "nor adapters of embeddings"),
    "tied": ({"target_modules": ["lm_head"]}, {"tie_word_embeddings": True}, "for lm_head"),
    "type": ({}, {"model_type": "bert"}, "type is 'bert', but fastlora can export"),
    "types": ({}, {"model_type": ["llama"]}, r"type is \['llama'\], but fastlora can export"),
    "heads": ({"target_modules": ["q_proj"]}, NO_HEADS, "multiple of 6 for 3 heads"),
    "large": ({"lora_alpha": 8, "alpha_pattern": {"v_proj": 1e9}}, {}, "too large for f16"),
}


@pytest.mark.parametrize("name", BAD)
def test_adapters_that_llama_cpp_can_t_hold(name, tmp_path):
    settings, about, message = BAD[name]
    folder = by_peft(tmp_path / "adapter", **{"target_modules": ["v_proj"]} | settings)
    (tmp_path / "base").mkdir()
    config = llama().config.to_dict() | about
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    call = {"model_config": tmp_path / "base", "dtype": "f16"}
    with pytest.raises(ValueError, match=message) as caught:
        fastlora.export_gguf(folder, tmp_path / "lora.gguf", **call)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "lora.gguf").exists()


def test_a_config_may_omit_its_class_s_defaults(tmp_path):
    folder = by_peft(tmp_path / "adapter", target_modules=["q_proj", "k_proj", "o_proj"])
    config = llama().config.to_dict()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "head_dim"})
    )
    fastlora.export_gguf(folder, tmp_path / "one.gguf", model_config=tmp_path / "base")
    fastlora.export_gguf(folder, tmp_path / "two.gguf", model_config=llama().config)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_config_that_is_not_there_is_named(tmp_path):
    folder = by_peft(tmp_path / "adapter", target_modules=["v_proj"])
    with pytest.raises(FileNotFoundError, match=r"AutoConfig\.from_pretrained\(name\)"):
        fastlora.export_gguf(folder, tmp_path / "x.gguf", model_config="Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("alpha", [0, -1e-60])
def test_an_alpha_that_llama_cpp_can_t_read_is_folded(alpha, tmp_path):
    settings = {"target_modules": ["v_proj"], "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}
    folder = by_peft(tmp_path / "adapter", **settings, lora_alpha=alpha)
    fastlora.export_gguf(folder, tmp_path / "x.gguf", model_config=llama().config)
    fields, tensors = read(tmp_path / "x.gguf")
    assert fields["adapter.lora.alpha"] == 1.0
    assert product(fields, tensors, "blk.0.attn_v.weight").abs().max() < 1e-30
    wanted = changes(folder)["model.layers.1.self_attn.v_proj.weight"]
    assert relative(product(fields, tensors, "blk.1.attn_v.weight"), wanted) < 1e-6


def test_a_model_s_file_is_not_written_over(tmp_path):
    folder, path = by_peft(tmp_path / "adapter", target_modules=["v_proj"]), tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="isn't an adapter's GGUF file: give another"):
        fastlora.export_gguf(folder, path, model_config=llama().config)
    assert path.read_bytes() == before


def test_bad_arguments(tmp_path):
    folder = by_peft(tmp_path / "adapter", target_modules=["v_proj"])
    path, config = tmp_path / "lora.gguf", llama().config
    with pytest.raises(ValueError, match="dtype is 'q4_0'"):
        fastlora.export_gguf(folder, path, model_config=config, dtype="q4_0")
    with pytest.raises(TypeError, match="model_config is None"):
        fastlora.export_gguf(folder, path, model_config=None)
    for taken in (folder, folder / "adapter_config.json"):
        with pytest.raises(ValueError, match="isn't an adapter's GGUF file: give another"):
            fastlora.export_gguf(folder, taken, model_config=config)
    fastlora.export_gguf(folder, path, model_config=config)
    fastlora.export_gguf(folder, path, model_config=config)  # replaces another adapter's file
