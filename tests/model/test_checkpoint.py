"""Adapter files: PEFT reads ours, we read PEFT's, and a damaged file changes nothing."""

import json
import os

import peft
import pytest
import torch
from models import Mlp, Tied, adapt, adapted_layers, randomise, refused
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import LoRAConfig
from fastlora.model.checkpoint import CONFIG, WEIGHTS


def same_mlp() -> torch.nn.Module:
    torch.manual_seed(7)
    return Mlp().eval()


def adapted(**settings) -> torch.nn.Module:
    return adapt(same_mlp(), **settings)


def test_the_order_of_overlapping_patterns_is_kept(tmp_path):
    """The first match counts.  PEFT's own files lose the order, so ours are asked."""
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
    model = randomise(fastlora.apply_lora(make(), config))
    fastlora.save_adapter(model, tmp_path)
    loaded, ids = fastlora.load_adapter(make(), tmp_path), torch.arange(5)
    assert torch.equal(loaded.tied(ids), model.tied(ids))
    assert loaded.tied.head.weight is loaded.tied.embed.weight


def test_file_metadata_and_dtype(tmp_path):
    from safetensors import safe_open

    fastlora.save_adapter(
        fastlora.apply_lora(Mlp().bfloat16(), LoRAConfig(target_modules=["up"])), tmp_path
    )
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


def test_loading_into_a_model_on_the_meta_device(tmp_path):
    fastlora.save_adapter(adapted(target_modules=["up"]), tmp_path)
    with torch.device("meta"):
        model = Mlp()
    with pytest.raises(ValueError, match="on the meta device"):
        fastlora.load_adapter(model, tmp_path)


def test_a_config_without_alpha_means_peft_s_default(tmp_path):
    fastlora.save_adapter(adapted(target_modules=["up"], lora_alpha=8), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    del values["lora_alpha"]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert fastlora.load_adapter(same_mlp(), tmp_path).up.lora_alpha == 8


def test_each_file_is_whole_when_interrupted_between_them(tmp_path, monkeypatch):
    model = adapted(target_modules=["up"])
    fastlora.save_adapter(model, tmp_path)
    old, replace = (tmp_path / CONFIG).read_bytes(), os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, to: replace(source, to) if to.name == WEIGHTS else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        fastlora.save_adapter(randomise(model), tmp_path)
    assert (tmp_path / CONFIG).read_bytes() == old
    load_file(tmp_path / WEIGHTS)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_an_interrupted_save_keeps_the_old_files(tmp_path, monkeypatch, failing):
    model = adapted(target_modules=["up"])
    fastlora.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync" if failing == "write" else "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fastlora.save_adapter(randomise(model), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit_config(folder, **changes) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


A, B = "base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"

TENSORS = {  # a change of the tensors, and what the error says
    "missing-key": (lambda t: t.pop(B), f"missing {B}"),
    "extra-key": (lambda t: t.update(other=torch.zeros(1)), "not known other"),
    "wrong-shape": (
        lambda t: t.update({A: torch.zeros(3, 8)}),
        r"shape \(3, 8\), but .* \(8, 8\)",
    ),
    "integers": (lambda t: t.update({A: t[A].to(torch.int64)}), "lora_A.weight of torch.int64"),
    "another-model": (
        lambda t: t.update({A.replace("up", "dawn"): t.pop(A)}),
        "missing .*up.lora_A.* not known .*dawn",
    ),
}
SETTINGS_THAT_FAIL = {
    "another-method": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "dora": ({"use_dora": True}, "doesn't support: use_dora=True"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "unknown-setting": ({"warp_factor": 9}, "warp_factor=9"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "rank-list": ({"rank_pattern": ["up"]}, "rank_pattern is"),
    "bad-pattern": ({"alpha_pattern": {"*up": 4}}, "alpha_pattern has"),
    "bad-task": ({"task_type": ["x"]}, "task_type is"),
    "bad-rank": ({"r": 0}, "rank must be a whole number"),
    "bad-dropout": ({"lora_dropout": 1.5}, "dropout is 1.5"),
    "null-alpha": ({"lora_alpha": None}, "lora_alpha is None"),
}
FILES = {  # a file, what it holds (of what it held), and what the error says
    "truncated": (WEIGHTS, lambda held: held[:-40], "damaged"),
    "empty": (WEIGHTS, lambda held: b"", "damaged"),
    "no-safetensors": (WEIGHTS, lambda held: b"PK\x03\x04 a pickle of old" * 9, "damaged"),
    "no-json": (CONFIG, lambda held: b"{", "is no JSON"),
    "json-list": (CONFIG, lambda held: b"[]", "no PEFT config"),
    "no-peft_type": (CONFIG, lambda held: b'{"r": 8}', "no PEFT config"),
}


def damage(folder, name) -> str:
    """What the error is to say."""
    if name in TENSORS:
        edit_tensors(folder, TENSORS[name][0])
        return TENSORS[name][1]
    if name in SETTINGS_THAT_FAIL:
        edit_config(folder, **SETTINGS_THAT_FAIL[name][0])
        return SETTINGS_THAT_FAIL[name][1]
    file, change, message = FILES[name]
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    return message


CASES = [*[(name, True) for name in (*TENSORS, *SETTINGS_THAT_FAIL, *FILES)]]
CASES += [(name, False) for name in (*TENSORS, "dora", "truncated")]


@pytest.mark.parametrize(("name", "fresh"), CASES)
def test_a_damaged_adapter_changes_nothing(tmp_path, name, fresh):
    fastlora.save_adapter(adapted(target_modules=["up"]), tmp_path)
    message = damage(tmp_path, name)
    model = same_mlp() if fresh else adapted(target_modules=["up"])
    with refused(model, message):
        fastlora.load_adapter(model, tmp_path)
    assert ("_fastlora" in model.__dict__) != fresh


@pytest.mark.parametrize(
    ("targets", "message"), [(["q_proj"], "It could match"), (None, "target_modules is None")]
)
def test_targets_that_a_plain_model_has_not(tmp_path, targets, message):
    fastlora.save_adapter(adapted(target_modules=["up"]), tmp_path)
    edit_config(tmp_path, target_modules=targets)
    model = same_mlp()
    with refused(model, message):
        fastlora.load_adapter(model, tmp_path)


def test_a_damaged_file_leaves_tied_weights_tied(tmp_path):
    config = LoRAConfig(target_modules=["mix"], modules_to_save=["head"])
    fastlora.save_adapter(fastlora.apply_lora(Tied(), config), tmp_path)
    edit_tensors(tmp_path, lambda t: t.update(other=torch.zeros(1)))
    model = Tied()
    with refused(model, "not known other"):
        fastlora.load_adapter(model, tmp_path)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("other", [{"r": 4}, {"lora_alpha": 3}, {"use_rslora": True}])
def test_another_adapter_in_the_model(tmp_path, other):
    fastlora.save_adapter(adapted(target_modules=["up"]), tmp_path)
    model = adapted(target_modules=["up"], **other)
    with refused(model, r"remove_lora\(model\) first"):
        fastlora.load_adapter(model, tmp_path)


def test_settings_that_are_off_are_no_error(tmp_path):
    fastlora.save_adapter(adapted(target_modules=["up"]), tmp_path)
    edit_config(
        tmp_path, use_dora=False, layers_to_transform=None, loftq_config={}, a_later_setting=False
    )
    model = fastlora.load_adapter(same_mlp(), tmp_path)
    assert adapted_layers(model) == {"up"}


def test_targets_that_this_model_has_not_are_no_error_in_a_file(tmp_path):
    """PEFT's configs often name the projections of several architectures."""
    fastlora.save_adapter(adapted(target_modules=["up"]), tmp_path)
    edit_config(tmp_path, target_modules=["up", "gate_proj"])
    model = fastlora.load_adapter(same_mlp(), tmp_path)
    assert adapted_layers(model) == {"up"}
