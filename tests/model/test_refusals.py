"""Refused arguments: wrong kinds, unsupported PEFT configs, folders without an adapter.

Also modules that occur at two places of a model; PEFT replaces only the first place.
"""

import copy
import inspect
import os
import shutil

import peft
import pytest
import torch
import wrong_kinds
from models import Mlp, Places, assert_untouched, randomize, refused, snapshot, tiny_llama
from torch import nn
from wrong_kinds import unexpected

import fastlora
from fastlora import LoRAConfig

UP = LoRAConfig(target_modules=["up"])


def names(model: nn.Module) -> dict[str, tuple]:
    layers = fastlora.coverage(model).layers
    return {layer.name: (layer.r, model.get_submodule(layer.name).scaling) for layer in layers}


PEFT_CONFIGS = {
    "plain": {"target_modules": ["q_proj", "up_proj"]},
    "all-linear": {"target_modules": "all-linear", "task_type": peft.TaskType.CAUSAL_LM},
    "set": {"target_modules": {"q_proj", "lm_head"}},
    "excluded-regex": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 3}, "use_rslora": True,
    },
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "in-full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    "first-values": {"target_modules": ["q_proj"], "init_lora_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("settings", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_apply_lora_takes_peft_s_config(settings, tmp_path):
    config = peft.LoraConfig(**settings)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings)).base_model.model
    layers = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    ours = fastlora.apply_lora(tiny_llama(), config)
    assert names(ours) == layers
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == trained
    fastlora.save_adapter(ours, tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).task_type == config.task_type


def without_weight(layer: nn.Linear) -> nn.Linear:
    layer.weight = None
    return layer


UNUSABLE = {
    "no-weight": (without_weight(nn.Linear(8, 8)), "it has no weight"),
    "empty": (nn.Linear(8, 0), r"its weight has shape \(0, 8\), and so no elements"),
}


@pytest.mark.parametrize(("layer", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_layer_without_numbers_takes_no_adapter(layer, reason):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    with refused(model, f"1 can't take an adapter: {reason}"):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["0", "1"]))
    with pytest.warns(UserWarning, match=reason):
        fastlora.apply_lora(model, LoRAConfig(target_modules="all-linear"))
    assert list(names(model)) == ["0"]


def test_a_lazy_module_beside_the_targets_leaves_all_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet: call the model once"):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["0"]))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


FOREIGN = {
    "pissa": (
        peft.LoraConfig(target_modules=["up"], init_lora_weights="pissa"),
        "init_lora_weights is 'pissa', but must be True, False or 'gaussian'",
    ),
    "another-method": (peft.IA3Config(target_modules=["up"]), "peft_type 'IA3'"),
    "a-subclass": (peft.AdaLoraConfig(target_modules=["up"], total_step=9), "peft_type 'ADALORA'"),
    "no-targets": (peft.LoraConfig(), "no target_modules, and fastlora doesn't have PEFT's table"),
    "experts": (
        peft.LoraConfig(target_modules=["up"], target_parameters=["norm.weight"]),
        "norm can't take an adapter|norm.weight, which is no weight of a linear layer",
    ),
    "dict": ({"r": 8}, r"^config is of type dict, .* or a peft.LoraConfig, .*Config\(\*\*config\)"),
    "peft-class": (peft.LoraConfig, "^config is the class LoraConfig itself"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), FOREIGN.values(), ids=FOREIGN)
def test_unsupported_configs_and_settings_are_named(config, message):
    error = ValueError if isinstance(config, peft.PeftConfig) else TypeError
    model = Mlp()
    with refused(model, message, error):
        fastlora.apply_lora(model, config)


def test_no_config():
    model = Mlp()
    before = snapshot(model)
    call = lambda value: fastlora.apply_lora(model, value)  # noqa: E731
    message = r"^config is .* but must be a fastlora.LoRAConfig or a peft.LoraConfig"
    assert unexpected(call, message, error=TypeError) == {}
    assert_untouched(model, before)


CALLS = {call.__name__: call for call in (fastlora.optimize, fastlora.restore, fastlora.coverage)}
CALLS |= {
    "apply_lora": lambda model: fastlora.apply_lora(model, UP),
    "remove_lora": fastlora.remove_lora,
    "merge_lora": fastlora.merge_lora,
    "unmerge_lora": fastlora.unmerge_lora,
    "save_adapter": lambda model: fastlora.save_adapter(model, "nowhere"),
    "load_adapter": lambda model: fastlora.load_adapter(model, "nowhere"),
    "print_trainable_parameters": fastlora.print_trainable_parameters,
}
MODEL_KINDS = {kind: v for kind, v in wrong_kinds.values().items() if kind != "module"}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_model(call):
    message = r"^model (is .* but )?must be a "
    assert unexpected(call, message, error=TypeError, kinds=MODEL_KINDS) == {}


@pytest.mark.parametrize("call", [fastlora.save_adapter, fastlora.load_adapter])
def test_no_folder(call):
    kinds = {kind: v for kind, v in wrong_kinds.values().items() if "text" not in kind}
    model, message = adapted(), r"^folder is .* must be a path"
    call_it = lambda value: call(model, value)  # noqa: E731
    assert unexpected(call_it, message, error=TypeError, kinds=kinds) == {}


CONFIG_FIELDS = {
    "r": (2**31, 10**30),
    "target_modules": ([3], {"up": 1}),
    "target_parameters": ("up.weight", [3]),
    "layers_to_transform": ("1", [True], {1: 2}),
    "layers_pattern": ([3], "("),
    "rank_pattern": ({3: 4}, {"up": "4"}, {"up": 10**30}, {"(" * 5000: 4}),
    "alpha_pattern": ({None: 4}, {"up": None}, {"a{9999999999}": 4}),
    "modules_to_save": ("head", [3], [""]),
    "init_lora_weights": ("eva",),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in CONFIG_FIELDS.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_invalid_config_values_are_refused(field, value):
    with pytest.raises(ValueError, match=r"is |has |not ") as caught:
        LoRAConfig(**{"target_modules": ["up"]} | {field: value})
    assert len(str(caught.value)) < 500


# The kinds of values that each field accepts; test_door.py tests numbers and switches.
FINE = {
    "target_modules": {"none", "text", "empty-text", "long-text", "empty-list"},
    "exclude_modules": {"none", "text", "empty-text", "long-text", "empty-list"},
    "target_parameters": {"none", "empty-list"},
    "layers_to_transform": {"none", "empty-list", "zero", "two", "huge"},
    "layers_pattern": {"none", "text", "empty-text", "long-text", "empty-list"},
    "rank_pattern": {"dict"},
    "alpha_pattern": {"dict"},
    "bias": set(),
    "modules_to_save": {"none", "empty-list"},
    "init_lora_weights": {"true", "false"},
    "task_type": {"none", "text", "empty-text", "long-text"},
    "base_model_name_or_path": {"none", "text", "empty-text", "long-text"},
}


@pytest.mark.parametrize("field", FINE)
def test_a_field_of_every_kind(field):
    kinds = {kind: v for kind, v in wrong_kinds.values().items() if kind != "unprintable"}
    call = lambda value: LoRAConfig(**{"target_modules": ["up"]} | {field: value})  # noqa: E731
    message = rf"^{field} is .* must "
    assert unexpected(call, message, FINE[field], error=ValueError, kinds=kinds) == {}


def with_peft() -> nn.Module:
    return peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=["up"]))


def adapted() -> nn.Module:
    return fastlora.apply_lora(Mlp(), UP)


SWITCHES = {
    "autocast_adapter_dtype": (Mlp, lambda model, **one: fastlora.apply_lora(model, UP, **one)),
    "keep_base": (adapted, fastlora.merge_lora),
    "strict": (with_peft, fastlora.optimize),
    "save_embedding_layers": (
        adapted,
        lambda model, **one: fastlora.save_adapter(model, "nowhere", **one),
    ),
    "tolerance": (with_peft, lambda model, **one: fastlora.check(model, torch.ones(2, 8), **one)),
}
TOLERANCES = {"none", "zero", "two", "half", "inf", "huge", "unprintable", "numpy-float64"}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_of_every_kind(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, call = SWITCHES[name]
    fine = TOLERANCES if name == "tolerance" else {"true", "false"}

    def untouched(value):
        model = make()
        before = snapshot(model)
        try:
            call(model, **{name: value})
        except BaseException:
            assert_untouched(model, before)
            assert not any(tmp_path.iterdir())
            raise
        shutil.rmtree("nowhere", ignore_errors=True)

    assert unexpected(untouched, rf"^{name} is .* must be", fine, error=ValueError) == {}


class Linear4bit(nn.Linear):
    """Has the name of bitsandbytes' class."""

    def forward(self, x):
        return super().forward(x)


def test_all_linear_names_the_layers_it_can_t_adapt():
    """It is an error if it can adapt none, and a warning if it leaves out some."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    config = LoRAConfig(target_modules="all-linear")
    model[0].__class__ = model[2].__class__ = Linear4bit
    message = r" 2 layers \(0, 2\): it is a Linear4bit, .*PEFT"
    with pytest.raises(ValueError, match=f"These can't be adapted:{message}"):
        fastlora.apply_lora(nn.Sequential(model[0], nn.ReLU(), model[2]), config)
    with pytest.warns(UserWarning, match=f"left out{message}"):
        fastlora.apply_lora(model, config)
    assert names(model).keys() == {"1"}


def test_a_peft_model_is_peft_s_to_save(tmp_path):
    model = with_peft()
    with pytest.raises(ValueError, match="this is a PEFT model: save it with model"):
        fastlora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="this is a PEFT model: load the adapter with model"):
        fastlora.load_adapter(model, tmp_path)


def several(folder) -> None:
    for name in ("first", "second"):
        with_peft().save_pretrained(folder / name)


FOLDERS = {
    "pickle": (
        lambda folder: with_peft().save_pretrained(folder, safe_serialization=False),
        "adapter_model.bin, a pickle.* PeftModel.from_pretrained",
    ),
    "subfolders": (several, r"in its subfolders \(first, second\): give one of these"),
    "whole-model": (lambda f: tiny_llama().save_pretrained(f), "holds a whole model: load it with"),
    "empty": (lambda folder: None, "an adapter's folder holds"),
    "no-folder": (lambda folder: folder.rmdir(), "an adapter's folder holds"),
    "file": (lambda folder: [folder.rmdir(), folder.touch()], "Give the folder, not a file"),
}


@pytest.mark.parametrize(("fill", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_holds_something_else(tmp_path, monkeypatch, fill, message):
    (tmp_path / "adapter").mkdir()
    fill(tmp_path / "adapter")
    model = Mlp()
    with refused(model, message, FileNotFoundError):
        fastlora.load_adapter(model, os.fspath(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"snapshot_download\('owner/some-lora'\)"):
        fastlora.load_adapter(model, "owner/some-lora")


def places() -> Places:
    torch.manual_seed(0)
    return Places()


def theirs(model: nn.Module, **settings) -> peft.PeftModel:
    return randomize(peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)))


X = torch.randn(3, 8)
TWO_PLACES = {
    "a-layer": ({"target_modules": ["one", "own"]}, "one and other are one Linear"),
    "all": ({"target_modules": "all-linear"}, "one and other are one Linear"),
    "a-weight": ({"target_modules": [], "target_parameters": ["one.weight"]}, "one and other"),
    "in-full": ({"target_modules": ["own"], "modules_to_save": ["one"]}, "one and other"),
    "a-block-in-full": (
        {"target_modules": ["own"], "modules_to_save": ["blocks.0"]},
        "blocks.0 and last, blocks.2 are one Mlp.*Put a copy .* at last, blocks.2",
    ),
}


@pytest.mark.parametrize(("settings", "message"), TWO_PLACES.values(), ids=TWO_PLACES)
def test_modules_at_two_places_are_refused_where_peft_differs(settings, message, tmp_path):
    model = places()
    with refused(model, message):
        fastlora.apply_lora(model, LoRAConfig(**settings))
    theirs(places(), **settings).save_pretrained(tmp_path)
    if peft.__version__ == "0.19.0" and "target_parameters" in settings:
        message = "PEFT 0.19.0 saved"
    with refused(model, message):
        fastlora.load_adapter(model, tmp_path)


def test_with_a_copy_at_the_other_place_peft_s_file_means_the_same(tmp_path):
    model = theirs(places(), target_modules=["one", "own"])
    model.save_pretrained(tmp_path)
    ours = places()
    ours.other = copy.deepcopy(ours.one)
    torch.testing.assert_close(fastlora.load_adapter(ours, tmp_path)(X), model(X))


def test_a_place_that_came_later_is_not_saved(tmp_path):
    model = fastlora.apply_lora(Mlp(), LoRAConfig(target_modules=["up"]))
    model.again = model.up
    with refused(model, "up and again are one LoRALinear"):
        fastlora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


MISTAKEN = {
    "rank": "'rank': for rank write r$",
    "lora_rank": "'lora_rank': for lora_rank write r$",
    "alpha": "'alpha': for alpha write lora_alpha$",
    "dropout": "'dropout': for dropout write lora_dropout$",
    "target_module": "'target_module': for target_module write target_modules$",
    "use_dora": r"'use_dora': use_dora needs PEFT: make its model, and call fastlora\.optimize",
    "warp": "'warp': the arguments are r, lora_alpha, lora_dropout, ",
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_an_unknown_field_names_the_one_to_use(name):
    with pytest.raises(TypeError, match=f"^LoRAConfig has no {MISTAKEN[name]}"):
        LoRAConfig(**{name: 1})


def test_several_unknown_fields_are_one_error():
    with pytest.raises(
        TypeError, match=r"no 'alpha', 'rank': for alpha write .*; for rank write r"
    ):
        LoRAConfig(16, rank=8, alpha=32)
    assert list(inspect.signature(LoRAConfig).parameters)[:2] == ["r", "lora_alpha"]
