"""A module's cached record is dropped when anything that it was read from changes."""

import copy
from unittest import mock

import pytest
import torch
from models import Mlp, adapt, randomize
from peft_models import inputs, mlp, optimized, other_config, up
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from vendor_layers import quantized

from fastlora import replace_linears
from fastlora.layers import guards
from fastlora.peft import layer as peft_layer


def read_anew(model: nn.Module, *inputs):
    for module in model.modules():
        guards.forget(module)
    return model(*inputs)


def own_model() -> tuple[nn.Module, torch.Tensor]:
    """A model with one LoRALinear, ``up``, and an input of that layer."""
    model = Mlp()
    replace_linears(model, ["up"], r=4, lora_alpha=8)
    return randomize(model), torch.randn(40, 8)


def two_adapters() -> nn.Module:
    model = mlp()
    model.add_adapter("b", other_config(target_modules=["up", "down"]))
    return optimized(randomize(model))


@pytest.mark.parametrize("replaced", ["default", "b"])
@pytest.mark.parametrize("world", [torch.enable_grad, torch.no_grad])
def test_untying_the_weights_of_two_adapters_is_seen(world, replaced):
    model = two_adapters()
    own = up(model).lora_A
    own["b"].weight = own["default"].weight
    with world():
        model(inputs())
        own[replaced].weight = nn.Parameter(torch.randn_like(own[replaced].weight))
        own[replaced].weight.requires_grad_(own["default"].weight.requires_grad)
        assert torch.equal(model(inputs()), read_anew(model, inputs()))


@pytest.mark.parametrize("how", ["assign", "functional"])
def test_untying_gate_and_up_is_seen(how):
    block = nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)))
    model = adapt(block, target_modules="all-linear")
    gate, up_proj = (block[0].get_submodule(f"{name}_proj").lora_A for name in ("gate", "up"))
    up_proj["default"].weight = gate["default"].weight
    x = torch.randn(64, 32, requires_grad=True)
    model(x)
    weight = nn.Parameter(torch.randn_like(gate["default"].weight))
    new = {"base_model.model.0.up_proj.lora_A.default.weight": weight}
    if how == "assign":
        model.load_state_dict(model.state_dict() | new, assign=True)
        assert torch.equal(model(x), read_anew(model, x))
    else:
        # a copy has no cached records
        got, expected = [
            torch.func.functional_call(each, new, (x,), tie_weights=False)
            for each in (model, copy.deepcopy(model))
        ]
        assert torch.equal(got, expected)


def test_a_change_by_another_thread_during_a_read_is_seen():
    model, read = two_adapters(), peft_layer.read

    def changing(layer, names):
        found = read(layer, names)
        if model.active_adapter != "b":
            model.set_adapter("b")  # simulates another thread in between
        return found

    with mock.patch.object(peft_layer, "read", changing):
        model(inputs())
    assert torch.equal(model(inputs()), read_anew(model, inputs()))


def test_an_own_layer_that_changes_while_it_is_read_is_read_again():
    model, x = own_model()
    read = type(model.up).read

    def changing(layer):
        found = read(layer)
        layer.scaling = 7.0
        return found

    with mock.patch.object(type(model.up), "read", changing):
        model(x)
    assert torch.equal(model(x), read_anew(model, x))


def test_a_list_of_active_adapters_of_a_class_of_its_own_is_looked_into():
    class Names(list):
        pass

    model = two_adapters()
    up(model)._active_adapter = Names(["default"])
    model(inputs())
    up(model)._active_adapter.append("b")
    assert torch.equal(model(inputs()), read_anew(model, inputs()))


@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize("kind", ["own", "peft", "block"])
def test_a_tensor_leaked_from_a_transform_works(kind, calls_before):
    """Its memory has an address only through the wrapper that torch.func.grad made."""
    block = nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)))
    make = {
        "own": lambda: own_model()[0].up,
        "peft": lambda: up(two_adapters()),
        "block": lambda: adapt(block, target_modules="all-linear"),
    }
    module, leaked = randomize(make[kind]()), []
    size = 32 if kind == "block" else module.in_features
    x = torch.randn(64, size, dtype=next(module.parameters()).dtype)
    torch.func.grad(lambda x: leaked.append(x) or x.sum())(x)
    for _ in range(calls_before):
        module(x)
    assert torch.equal(module(leaked[0]), module(x))


def test_a_property_of_peft_s_that_is_patched_after_a_call(monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = two_adapters()
    before = model(inputs())
    monkeypatch.setattr(BaseTunerLayer, "active_adapters", property(lambda layer: ["b"]))
    after = model(inputs())
    assert torch.equal(after, read_anew(model, inputs()))
    assert not torch.equal(after, before)


@pytest.mark.parametrize(("kind", "name"), [("gguf-q8_0", "weight"), ("rotated-int8", "codes")])
def test_packed_numbers_that_change_in_place_are_read_again(kind, name):
    """A record may depend on them, for example on the order of a GPTQ layer's columns."""
    (layer,) = adapt(nn.Sequential(quantized(kind, 256, 32)), target_modules=["0"]).base_model.model

    def found():
        return guards.record_of(layer)[1]

    assert isinstance(found(), guards.Record)
    assert isinstance(found(), list)
    with torch.no_grad():
        getattr(layer.base_layer, name).add_(0)
    assert isinstance(found(), guards.Record)


def test_a_layer_of_another_class_is_read_again():
    model, x = own_model()
    kind = type(model.up)
    model(x)
    model.up.__class__ = type("Scaled", (kind,), {"scaling": property(lambda layer: 7.0)})
    assert torch.equal(model(x), read_anew(model, x))
