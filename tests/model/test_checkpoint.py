"""Adapter files: PEFT reads fastlora's, fastlora reads PEFT's, and a damaged file changes nothing.

The last tests use files that PEFT users have: other initial values, output heads, new tokens.
"""

import json
import os
import shutil
import struct
from contextlib import nullcontext

import accelerate
import peft
import pytest
import torch
from judge import peak_bytes
from models import Mlp, Tied, adapt, adapted_layers, randomize, refused, tiny_llama
from peft_models import change_config, change_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import fastlora
from fastlora import LoRAConfig
from fastlora.model.checkpoint import CONFIG, WEIGHTS


def same_mlp() -> torch.nn.Module:
    torch.manual_seed(7)
    return Mlp().eval()


def adapted(**settings) -> torch.nn.Module:
    return adapt(same_mlp(), **settings)


@pytest.fixture
def folder(tmp_path):
    """A folder with an adapter's files."""
    fastlora.save_adapter(adapted(target_modules=["up"]), tmp_path)
    return tmp_path


def test_the_order_of_overlapping_patterns_is_kept(tmp_path):
    """The first match counts.  PEFT's own files lose the order, so fastlora's are tested."""
    patterns = {"alpha_pattern": {"up": 64, "down|up": 8}, "rank_pattern": {"u.*": 4, "up": 2}}
    model, x = adapted(target_modules=["up", "down"], **patterns), torch.randn(5, 8)
    fastlora.save_adapter(model, tmp_path)
    assert torch.equal(fastlora.load_adapter(same_mlp(), tmp_path)(x), model(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(same_mlp(), tmp_path)(x), model(x))


@pytest.mark.parametrize("saved", [["embed", "head"], ["tied"]], ids=["two", "inside-one"])
def test_tied_modules_to_save(tmp_path, saved):
    def make():
        torch.manual_seed(3)
        model = torch.nn.Module()
        model.tied, model.mix = Tied(), torch.nn.Linear(20, 20)
        return model

    config = LoRAConfig(target_modules=["mix"], exclude_modules=["tied.mix"], modules_to_save=saved)
    model = randomize(fastlora.apply_lora(make(), config))
    fastlora.save_adapter(model, tmp_path)
    loaded, ids = fastlora.load_adapter(make(), tmp_path), torch.arange(5)
    assert torch.equal(loaded.tied(ids), model.tied(ids))
    assert loaded.tied.head.weight is loaded.tied.embed.weight


def test_file_metadata_and_dtype(tmp_path):
    model = fastlora.apply_lora(Mlp().bfloat16(), LoRAConfig(target_modules=["up"]))
    fastlora.save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("base_model.model.up.lora_A.weight").dtype == torch.float32


def test_an_adapter_saved_while_merged_is_the_same(tmp_path):
    model = adapted(target_modules=["up"])
    fastlora.save_adapter(model, tmp_path / "plain")
    fastlora.save_adapter(fastlora.merge_lora(model), tmp_path / "merged")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_adapters_that_came_or_went_are_not_saved(tmp_path):
    model = torch.nn.Sequential(same_mlp(), same_mlp())
    fastlora.apply_lora(model, LoRAConfig(target_modules=["up"]))
    fastlora.remove_lora(model[0])
    with pytest.raises(ValueError, match=r"0\.up came or went"):
        fastlora.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_loading_into_a_model_on_the_meta_device(folder):
    with pytest.raises(ValueError, match="on the meta device"):
        fastlora.load_adapter(Mlp().to("meta"), folder)


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloaded_adapters_are_saved(to, tmp_path):
    settings = {"target_modules": ["up"], "bias": "all", "modules_to_save": ["head"]}
    model, expected = adapted(**settings), tmp_path / "expected"
    fastlora.save_adapter(model, expected)
    place = {"offload_dir": tmp_path / "weights"} if to == "disk" else {}
    getattr(accelerate, f"{to}_offload")(model, execution_device=torch.device("cpu"), **place)
    model(torch.randn(2, 8))
    assert all(parameter.is_meta for parameter in model.parameters())
    fastlora.save_adapter(model, tmp_path / "saved")
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="take accelerate's offload away first"):
        fastlora.load_adapter(model, expected)


def test_adapters_on_the_meta_device_are_not_saved(tmp_path):
    model = adapted(target_modules=["up"]).to("meta")
    with pytest.raises(ValueError, match=r"up\.lora_A\.weight is on the meta device, without numb"):
        fastlora.save_adapter(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_config_without_alpha_means_peft_s_default(folder):
    """Also in a file with a byte-order mark."""
    values = json.loads((folder / CONFIG).read_text())
    assert values.pop("lora_alpha") == 16
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8-sig")
    assert fastlora.load_adapter(same_mlp(), folder).up.lora_alpha == 8


def test_each_file_is_whole_when_interrupted_between_them(folder, monkeypatch):
    old, replace = (folder / CONFIG).read_bytes(), os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, to: replace(source, to) if to.name == WEIGHTS else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        fastlora.save_adapter(adapted(target_modules=["up"]), folder)
    assert (folder / CONFIG).read_bytes() == old
    load_file(folder / WEIGHTS)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG}


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_an_interrupted_save_keeps_the_old_files(folder, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync" if failing == "write" else "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fastlora.save_adapter(adapted(target_modules=["up"]), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def with_config(**changes):
    return lambda folder: change_config(folder, **changes)


def with_tensor(key: str, value: torch.Tensor):
    """Add this tensor to the file, or replace it."""
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({key: value}))


def with_bytes(file: str, contents: bytes):
    return lambda folder: (folder / file).write_bytes(contents)


def with_header(**tensors):
    """Write a safetensors file that consists of this header only."""
    header = json.dumps(tensors).encode()
    return with_bytes(WEIGHTS, struct.pack("<Q", len(header)) + header)


def entry(*shape: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}


A, B = "base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"
HUGE_RANK = r"shape \(8, 8\), but .* \(100000000, 8\)"
OF_TENSORS = {  # the damage done to the folder, and the error message
    "missing-key": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.pop(B)),
        r"it lacks up\.lora_B\.weight, which the model has\. ",
    ),
    "extra-key": (with_tensor("other", torch.zeros(1)), "it has other, which the model lacks"),
    "wrong-shape": (with_tensor(A, torch.zeros(3, 8)), r"shape \(3, 8\), but .* \(8, 8\)"),
    "scalar": (with_tensor(A, torch.zeros(())), r"of shape \(\)"),
    "integers": (with_tensor(A, torch.ones(8, 8).long()), "lora_A.weight of torch.int64"),
    "complex": (with_tensor(A, torch.ones(8, 8) * 1j), "lora_A.weight of C64"),
    "another-model": (
        lambda folder: change_tensors(
            folder, lambda t: t.update({A.replace("up", "dawn"): t.pop(A)})
        ),
        r"it lacks up\.lora_A\.weight, which the model has; it has dawn\.lora_A\.weight, which",
    ),
    "truncated": (lambda folder: os.truncate(folder / WEIGHTS, 500), "damaged"),
    "deep-json": (with_bytes(CONFIG, b"[" * 100_000), "nested too deeply"),
    "dora": (with_config(use_dora=True), "doesn't support: use_dora=True"),
}
DAMAGED = OF_TENSORS | {
    "another-method": (with_config(peft_type="IA3"), "peft_type 'IA3'"),
    "unknown-setting": (with_config(warp_factor=9), "warp_factor=9"),
    "rank-list": (with_config(rank_pattern=["up"]), "rank_pattern is"),
    "bad-pattern": (with_config(alpha_pattern={"*up": 4}), "alpha_pattern has"),
    "bad-rank": (with_config(r=0), "rank must be a whole number"),
    "null-alpha": (with_config(lora_alpha=None), "lora_alpha is None"),
    "huge-rank": (with_config(r=10**8), r"shape \(8, 8\), but .* \(100000000, 8\)"),
    "alpha-infinite": (with_config(lora_alpha=float("inf")), "lora_alpha is inf"),
    "no-text": (with_bytes(CONFIG, b"\xff\xfe{}"), "is not valid JSON"),
    "no-peft_type": (with_bytes(CONFIG, b'{"r": 8}'), "not a PEFT config"),
    "no-targets-here": (with_config(target_modules=["q_proj"]), "It could match"),
    "no-targets": (with_config(target_modules=None), "target_modules is None"),
    "no-safetensors": (with_bytes(WEIGHTS, b"PK\x03\x04 a pickle of old" * 9), "damaged"),
    "shape-without-data": (with_header(**{A: entry(10**9, 8), B: entry(12, 10**9)}), "is damaged"),
    "negative-shape": (with_header(**{A: entry(-1, 8)}), "is damaged"),
    "no-bytes-a-number": (
        with_header(**{A: entry(8, 0, dtype="F4"), B: entry(12, 0)}),
        "doesn't fit|is damaged|of shape",
    ),
}
CASES = [(name, True) for name in DAMAGED] + [(name, False) for name in OF_TENSORS]


@pytest.mark.parametrize(("name", "fresh"), CASES)
def test_a_damaged_adapter_changes_nothing(folder, name, fresh):
    harm, message = DAMAGED[name]
    harm(folder)
    model = same_mlp() if fresh else adapted(target_modules=["up"])
    with refused(model, message):
        fastlora.load_adapter(model, folder)
    assert ("_fastlora" in model.__dict__) != fresh


def test_nothing_is_allocated_for_a_rank_that_the_file_hasn_t(folder):
    change_config(folder, r=1_000_000)  # 80 MB
    model = Mlp()

    def load() -> None:
        with pytest.raises(ValueError, match=r"\(1000000, 8\)"):
            fastlora.load_adapter(model, folder)

    before, peak, _ = peak_bytes(model.parameters(), load)
    assert peak - before < 2**20


@pytest.mark.parametrize("fresh", [True, False], ids=["plain", "adapted"])
@pytest.mark.parametrize(
    "change", [lambda t: t * torch.nan, lambda t: t.to(torch.float8_e4m3fn)], ids=["nan", "float8"]
)
def test_values_of_every_kind_are_loaded(folder, change, fresh):
    """PEFT loads them also.  NaN differs from itself, but is no sign of an untied weight."""
    change_tensors(folder, lambda t: t.update({A: change(t[A])}))
    value = load_file(folder / WEIGHTS)[A]
    broken = not value.float().isfinite().all()
    said = pytest.warns(UserWarning, match=rf"NaN or infinity in {A}") if broken else nullcontext()
    with said:
        model = fastlora.load_adapter(Mlp() if fresh else adapted(target_modules=["up"]), folder)
    torch.testing.assert_close(model.up.lora_A, value.float(), equal_nan=True)


def test_a_damaged_file_leaves_tied_weights_tied(tmp_path):
    config = LoRAConfig(target_modules=["mix"], modules_to_save=["head"])
    fastlora.save_adapter(fastlora.apply_lora(Tied(), config), tmp_path)
    with_tensor("other", torch.zeros(1))(tmp_path)
    model = Tied()
    with refused(model, "it has other, which the model lacks"):
        fastlora.load_adapter(model, tmp_path)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("other", [{"r": 4}, {"lora_alpha": 3}, {"use_rslora": True}])
def test_another_adapter_in_the_model(folder, other):
    model = adapted(target_modules=["up"], **other)
    with refused(model, r"remove_lora\(model\) first"):
        fastlora.load_adapter(model, folder)


def test_settings_that_are_off_and_targets_of_other_models_are_no_error(folder):
    """PEFT's configs often name the projections of several architectures."""
    off = {"use_dora": False, "layers_to_transform": None, "loftq_config": {}}
    change_config(folder, **off, a_later_setting=False, target_modules=["up", "gate_proj"])
    assert adapted_layers(fastlora.load_adapter(same_mlp(), folder)) == {"up"}


EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
HEAD_BASE = "base_model.model.lm_head.base_layer.weight"


def llama(**settings) -> torch.nn.Module:
    torch.manual_seed(3)
    return tiny_llama(**settings)


@pytest.fixture(params=[False, True], ids=["", "tied"])
def base(request, tmp_path_factory):
    """A function that loads the same base model from its files each time, with added tokens."""
    folder = tmp_path_factory.mktemp("base")
    llama(tie_word_embeddings=request.param).save_pretrained(folder)

    def load(tokens: int = 100) -> torch.nn.Module:
        model = LlamaForCausalLM.from_pretrained(folder).eval()
        model.resize_token_embeddings(tokens, mean_resizing=False)
        return model

    return load


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(100)[None, -12:]).logits


def saved_by_peft(model: torch.nn.Module, folder, settings: dict, **how) -> torch.nn.Module:
    theirs = randomize(peft.get_peft_model(model, peft.LoraConfig(**settings)), 0.1).eval()
    theirs.save_pretrained(folder, **how)
    return theirs


@pytest.mark.parametrize("targets", ["all-linear", ".*q_proj"])
def test_chosen_layers_need_a_list(targets):
    with pytest.raises(ValueError, match=r"layers_to_transform is \(1,\) and target_modules"):
        LoRAConfig(target_modules=targets, layers_to_transform=1)


def test_trained_biases_that_peft_left_out_are_named(tmp_path):
    saved_by_peft(llama(attention_bias=True), tmp_path, {"target_modules": ["q_proj"]})
    change_config(tmp_path, bias="lora_only")
    model = llama(attention_bias=True)
    with refused(model, "PEFT before 0.21 leaves trained biases"):
        fastlora.load_adapter(model, tmp_path)


def test_orthogonal_initialization_loads_because_it_keeps_the_base(tmp_path):
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


@pytest.mark.parametrize(
    ("tokens", "asked", "are_saved"), [(100, "auto", False), (100, True, True), (104, False, False)]
)
def test_embeddings_of_the_base_s_size_are_saved_only_if_asked(
    base, tokens, asked, are_saved, tmp_path
):
    model = fastlora.apply_lora(base(tokens), LoRAConfig(target_modules=["q_proj"]))
    fastlora.save_adapter(model, tmp_path, save_embedding_layers=asked)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert [key in keys for key in (EMBED, HEAD)] == [are_saved] * 2
    with pytest.raises(ValueError, match="save_embedding_layers is 'yes'"):
        fastlora.save_adapter(model, tmp_path, save_embedding_layers="yes")


def test_a_model_without_the_new_tokens(base, tmp_path):
    model = fastlora.apply_lora(base(104), LoRAConfig(target_modules=["q_proj", "lm_head"]))
    fastlora.save_adapter(model, tmp_path)
    plain = base()
    with refused(plain, r"resize_token_embeddings\(104\) first"):
        fastlora.load_adapter(plain, tmp_path)


def test_a_missing_base_folder_is_warned_of(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    fastlora.apply_lora(model, LoRAConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="can't read the config in .* save_embedding_layers=True"):
        fastlora.save_adapter(model, tmp_path / "adapter")
