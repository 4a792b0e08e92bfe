"""optimize also replaces a model's frozen layers on a CPU that multiplies 16-bit numbers slowly."""

import copy
import pickle
import re
from pathlib import Path

import peft
import pytest
import torch
from models import Mlp, counted_frozen_calls, fast_layers, tiny_llama
from peft.tuners import lora
from peft_llama import logits
from peft_models import adapted

import fastlora
from fastlora.backends import products
from fastlora.peft.optimize import while_optimized

BASE = "base_model.model."
DOCS = Path(__file__).parents[2] / "docs" / "cpu.md"
HEAD, UP = f"{BASE}head", f"{BASE}up.base_layer"


@pytest.fixture(autouse=True)
def _wide(wide):
    """Applies ``wide`` to all tests."""


def mlp(**settings):
    """A model with an adapter on up, and none on down and head."""
    return adapted(Mlp().bfloat16(), **{"target_modules": ["up"]} | settings)


def optimized(**settings):
    model = mlp(**settings)
    fastlora.optimize(model, strict=True)
    return model


def x():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 5, 8, generator=generator).bfloat16()


def test_the_report_lists_them_apart():
    model = mlp()
    assert fastlora.coverage(model).frozen_linears == ()
    report = fastlora.coverage(fastlora.optimize(model))
    assert report.frozen_linears == fastlora.coverage(model).frozen_linears == (f"{BASE}down", HEAD)
    assert [layer.name for layer in report.layers] == [f"{BASE}up"]
    assert str(report).splitlines()[0] == "1 of 1 layers fast (backend torch)"
    assert f"2 without an adapter: {BASE}down, {HEAD}: in float32" in str(report)
    assert pickle.loads(pickle.dumps(report)).frozen_linears == report.frozen_linears


def test_bases_are_fast_in_calls_without_their_adapters():
    model = optimized()
    assert fast_layers(model) == {UP, f"{BASE}down", HEAD}
    for calls_of, expected in ((model.disable_adapter, 3), (torch.no_grad, 2)):
        with calls_of(), counted_frozen_calls() as calls:
            model(x())
        assert len(calls) == expected
    model.merge_adapter()
    with counted_frozen_calls() as calls:
        model(x())
    assert len(calls) == 3


def test_the_switch_and_the_end_of_with():
    model = mlp()
    fastlora.optimize(model, frozen_linears=False)
    with while_optimized(model) as report:
        assert fast_layers(model)
        assert report.frozen_linears == (f"{BASE}down", HEAD)
    assert not fast_layers(model)
    fastlora.optimize(model)
    assert fast_layers(model)
    assert not fast_layers(fastlora.optimize(model, frozen_linears=False))
    fastlora.optimize(model)
    before = fast_layers(model)
    assert fastlora.check(model, x())  # which compares with PEFT's own
    assert fast_layers(model) == before
    fastlora.restore(model)
    assert not fast_layers(model)


def test_nothing_changes_where_it_does_not_gain(monkeypatch):
    monkeypatch.setenv("FASTLORA_DISABLE", "1")
    assert fastlora.coverage(fastlora.optimize(mlp())).frozen_linears == ()
    assert fastlora.coverage(fastlora.optimize(mlp().float())).frozen_linears == ()
    monkeypatch.delenv("FASTLORA_DISABLE")
    monkeypatch.setattr(products, "FORCED", False)
    model = mlp()
    report = fastlora.coverage(fastlora.optimize(model))
    assert fast_layers(model) == set()
    assert report.frozen_linears == ()
    assert str(report) == "1 of 1 layers fast (backend torch)"


def test_an_adapter_that_peft_adds_later():
    model = optimized()
    model.add_adapter("late", peft.LoraConfig(target_modules=["head", "down"], r=2))
    model.set_adapter("late")
    assert type(model.get_submodule(HEAD)) is lora.Linear
    report = fastlora.coverage(fastlora.optimize(model, strict=True))
    assert len(report.layers) == 3
    assert report.frozen_linears == ()
    with counted_frozen_calls() as calls:
        model(x()).sum().backward()
    assert len(calls) == 1  # up has no adapter of this name, so PEFT calls its base
    assert model.get_submodule(HEAD).lora_B["late"].weight.grad is not None


def test_the_attention_that_the_docs_write_down_is_closer_to_the_truth():
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.S | re.M)
    (code,) = [block for block in blocks if "AttentionInterface" in block]
    model = adapted(tiny_llama(torch.bfloat16), target_modules=["q_proj"])
    fastlora.optimize(model)
    truth = logits(copy.deepcopy(model).double())
    before = logits(model)
    exec(code, {"model": model})
    after = logits(model)
    assert model.config._attn_implementation == "float32"
    assert (after - truth).norm() <= 1.05 * (before - truth).norm()
    assert not torch.equal(after, before)
