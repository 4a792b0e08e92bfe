"""apply_lora and remove_lora: the adapted layers, the trainable parameters, no other changes."""

from unittest import mock

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import (
    Mlp,
    Tied,
    adapt,
    adapted_layers,
    assert_untouched,
    refused,
    snapshot,
    tiny_llama,
    trained,
)
from process import run_forked
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import LoRAConfig
from fastlora.model import targets

LLAMA_ATTENTION = {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"}


def test_default_targets_are_the_attention_projections():
    model = fastlora.apply_lora(tiny_llama(), LoRAConfig())
    assert adapted_layers(model) == LLAMA_ATTENTION
    assert trained(model) == {f"{name}.lora_{half}" for name in LLAMA_ATTENTION for half in "AB"}


def test_a_tied_target_stays_tied():
    model = fastlora.apply_lora(Tied(), LoRAConfig(target_modules=["head"]))
    assert model.head.weight is model.embed.weight
    assert model.head.lora_A.shape == (8, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_adapter_dtypes(dtype):
    config = LoRAConfig(target_modules=["up"])
    wide = torch.promote_types(dtype, torch.float32)
    assert fastlora.apply_lora(Mlp().to(dtype), config).up.lora_A.dtype == wide
    model = fastlora.apply_lora(Mlp().to(dtype), config, autocast_adapter_dtype=False)
    assert model.up.lora_B.dtype == dtype


def test_remove_lora_of_a_model_whose_parts_were_adapted():
    model = nn.Sequential(Mlp(), Mlp())
    before = snapshot(model)
    for part in model:
        fastlora.apply_lora(part, LoRAConfig(target_modules=["up"]))
    fastlora.remove_lora(model)
    assert_untouched(model, before)
    assert all("_fastlora" not in part.__dict__ for part in model)


def test_remove_lora_under_classes_and_hooks_of_others():
    """FSDP2's class and accelerate's hook came after apply_lora, and stay afterwards."""
    model, x = Mlp(), torch.randn(2, 8)
    expected = model(x)
    fastlora.apply_lora(model, LoRAConfig(target_modules=["up", "down"]))
    add_hook_to_module(model.up, ModelHook())
    model.down.__class__ = type("FSDPLoRALinear", (FSDPModule, type(model.down)), {})
    fastlora.remove_lora(model)
    assert torch.equal(model(x), expected)
    assert type(model.up) is nn.Linear
    assert type(model.down).__bases__ == (FSDPModule, nn.Linear)


def test_all_linear_skips_layers_whose_weights_a_fused_module_reads():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 4))
    around = r"2 layers \(0.linear1, 0.linear2\): the TransformerEncoderLayer around"
    with pytest.warns(UserWarning, match=around):
        fastlora.apply_lora(model, LoRAConfig(target_modules="all-linear"))
    assert adapted_layers(model) == {"1"}


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapped_model(wrap, tmp_path):
    model = Mlp()
    wrapped = wrap(model)
    assert fastlora.apply_lora(wrapped, LoRAConfig(target_modules=["up"])) is wrapped
    assert adapted_layers(model) == {"up"}
    fastlora.save_adapter(wrapped, tmp_path)
    assert fastlora.load_adapter(wrapped, tmp_path) is wrapped
    assert fastlora.merge_lora(wrapped) is wrapped
    assert fastlora.remove_lora(wrapped) is wrapped
    assert type(model.up) is nn.Linear
    fastlora.load_adapter(Mlp(), tmp_path)


def test_a_submodule_called_module_is_no_wrapper():
    model = nn.Module()
    model.module, model.layer = Mlp(), nn.Linear(3, 3)
    fastlora.apply_lora(model, LoRAConfig(target_modules=["layer", "up"]))
    assert {layer.name for layer in fastlora.coverage(model).layers} == {"layer", "module.up"}


def test_print_trainable_parameters(capsys):
    model = fastlora.apply_lora(Mlp(), LoRAConfig(r=2, target_modules=["up"]))
    fastlora.print_trainable_parameters(model)
    printed = capsys.readouterr().out
    assert printed == "trainable params: 40 || all params: 304 || trainable%: 13.1579\n"


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


def mlp_with(**parts) -> nn.Module:
    model = Mlp()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def replaced_forward() -> nn.Module:
    layer = nn.Linear(8, 12)
    layer.forward = layer.forward
    return mlp_with(up=layer)


def with_peft() -> nn.Module:
    return peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=["up"]))


def weight_norm() -> nn.Module:
    return mlp_with(up=nn.utils.parametrizations.weight_norm(nn.Linear(8, 12)))


ERRORS = {  # a model, its targets or all settings, and the error message
    "nothing-matches": (Mlp, ["qproj"], r"matches no module. It could match: up \(1\)"),
    "all_linear": (Mlp, "all_linear", 'matches no module, but "all-linear" would. It could match'),
    "all-linear-in-a-list": (Mlp, ["all-linear"], 'matches no module, but "all-linear" would'),
    "one-name-matches-nothing": (Mlp, ["up", "gate"], "has 'gate', which matches no module"),
    "regex-matches-nothing": (Mlp, "q.*", "It could match"),
    "no-regex": (Mlp, "*up", "is no regular expression"),
    "no-target-and-no-transformer": (Mlp, None, "target_modules is None"),
    "no-linear": (Mlp, ["norm"], "norm can't take an adapter: it is a LayerNorm"),
    "no-linear-at-all": (nn.ReLU, ["up"], "no linear layer that could be adapted"),
    "replaced-forward": (replaced_forward, ["up"], "its forward was replaced"),
    "encoder-layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16), ["linear1"],
        "linear1 can't take an adapter: the TransformerEncoderLayer around it",
    ),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2), ["out_proj"], "out_proj can't take an adapter",
    ),
    "weight-norm": (weight_norm, ["up"], "up can't take an adapter: its weight is computed"),
    "peft-model": (with_peft, ["down"], "has a PEFT adapter"),
    # PEFT takes its weight for [out, in], so its file would have other shapes.
    "conv1d-by-its-weight": (
        lambda: nn.ModuleDict({"c_attn": Conv1D(6, 8)}), {"target_parameters": ["c_attn.weight"]},
        "c_attn.weight, a Conv1D's .* in target_modules",
    ),
    "extra-state": (
        lambda: mlp_with(head=Stateful(8, 4)),
        {"target_modules": ["up"], "modules_to_save": ["head"]},
        "head can't be saved: its _extra_state is a dict",
    ),
    "unknown-module": (Mlp, {"target_modules": ["up"], "modules_to_save": ["tail"]}, "has 'tail'"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "settings", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_leave_the_model_unchanged(make, settings, message):
    model = make()
    settings = settings if isinstance(settings, dict) else {"target_modules": settings}
    with refused(model, message):
        fastlora.apply_lora(model, LoRAConfig(**settings))


def test_running_out_of_memory_leaves_the_model_unchanged(monkeypatch):
    results = [(nn.Parameter(torch.ones(8, 8)),) * 2, RuntimeError("out of memory")]
    monkeypatch.setattr(targets, "new_adapter", mock.Mock(side_effect=results))
    model, config = Tied(), LoRAConfig(target_modules="all-linear", modules_to_save=["embed"])
    with refused(model, "out of memory", RuntimeError):
        fastlora.apply_lora(model, config)


def test_a_pickle_of_one_layer_loads_in_another_process(tmp_path):
    model = adapt(nn.Sequential(Conv1D(6, 8)), target_modules=["0"])
    torch.save(model, tmp_path / "layer.pt")
    code = (
        "import sys, torch; "
        f"model = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False); "
        "print(type(model[0]).__name__, model(torch.ones(1, 8)).tolist())"
    )
    kind = type(model[0]).__name__
    assert run_forked(code) == f"{kind} {model(torch.ones(1, 8)).tolist()}"
