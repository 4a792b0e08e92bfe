"""PEFT's layers over bitsandbytes' layers, with fastlora and without it: the same numbers."""

import copy
import pickle

import peft
import pytest
import torch
from bnb_layers import KINDS, bnb, dequantised, quantised, repack
from memory import saved_bytes
from torch import nn

import fastlora
from fastlora.peft.masks import shared_masks

CASES = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
    "bias": {"bias": "all", "lora_bias": True},
}


def peft_model(kind: str, dtype=torch.float32, adapters=("default",), **settings):
    model = nn.Sequential(quantised(kind, 64, 128, dtype=dtype), quantised(kind, dtype=dtype))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"
    settings = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": False} | settings
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(model, config)
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model


def numbers(model: nn.Module, x: torch.Tensor, dtype=None) -> list[torch.Tensor]:
    """The output, and the gradients of x and of all that trains."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]


def assert_same(model, x, tolerance, dtype=None):
    """PEFT's numbers and the fast ones, and that every layer was fast."""
    with shared_masks(model):
        theirs = numbers(model, x, dtype)
        coverage = fastlora.optimize(model, strict=True)
        ours = numbers(model, x, dtype)
    assert not coverage.eager
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert (our - their).double().norm() <= tolerance * their.double().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_the_numbers_are_pefts(kind, settings):
    assert_same(peft_model(kind, **settings), torch.randn(3, 5, 64), 2e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_several_adapters(kind):
    assert_same(peft_model(kind, adapters=("default", "other")), torch.randn(3, 5, 64), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_sixteen_bits_whatever_dtype_x_has(dtype):
    model = peft_model("nf4", torch.bfloat16, lora_dropout=0.2)
    assert_same(model, torch.randn(3, 5, 64).to(dtype), 0.02)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_autocast(kind):
    assert_same(peft_model(kind), torch.randn(3, 5, 64), 0.03, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_x_and_h(kind):
    """PEFT keeps a dropped x beside."""
    model = peft_model(kind, lora_dropout=0.1)
    fastlora.optimize(model)
    layer = model.base_model.model[0]
    x = torch.randn(64, 64, requires_grad=True)
    given = [x, *layer.parameters(), *layer.base_layer.parameters()]
    state = getattr(layer.base_layer.weight, "quant_state", None)
    given += [] if state is None else [state.absmax, state.state2.absmax, state.state2.code]
    given += [] if state is None else [state.offset]
    scale = None if state is not None else layer.base_layer.weight.SCB
    given += [] if scale is None else [scale]
    kept = saved_bytes(lambda: layer(x), apart_from=given)
    assert sum(kept.values()) <= 4 * 64 * 4 + 8


def test_coverage_says_what_is_quantised_and_why_not():
    model = peft_model("nf4")
    text = str(fastlora.optimize(model))
    assert "2 of 2 layers fast" in text
    assert "2 quantised: NF4" in text
    repack(model.base_model.model[0].base_layer)
    with torch.no_grad():
        report = fastlora.coverage(model)
    (eager,) = report.eager
    assert "repacked for bitsandbytes' own CPU kernel" in eager.reason
    assert [layer.packed for layer in report.layers] == ["", "NF4"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_over_a_weight_that_was_repacked_for_evaluation(mode):
    """Whose kernel gives x no gradient, in bitsandbytes and so in PEFT."""
    model, x = peft_model("nf4", bias="none"), torch.randn(3, 64, requires_grad=True)
    fastlora.optimize(model)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    for layer in model.base_model.model:
        repack(layer.base_layer)
    (found,) = torch.autograd.grad(getattr(model, mode)()(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_disabling_files_and_the_way_back_stay_pefts(kind):
    model, x = peft_model(kind), torch.randn(3, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(layer) for layer in model.modules()]
    fastlora.optimize(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with model.disable_adapter():
        weight = dequantised(model.base_model.model[0].base_layer)
        found = model.base_model.model[0](x.requires_grad_())
        expected = nn.functional.linear(x, weight, model.base_model.model[0].base_layer.bias)
        torch.testing.assert_close(found, expected)
    fastlora.restore(model)
    assert [type(layer) for layer in model.modules()] == classes
    fastlora.optimize(model)
    model.merge_adapter()
    assert torch.isfinite(model(x)).all()
    model.unmerge_adapter()
    assert model(x).grad_fn.name() == "LoRALinearFunctionBackward"
    base = model.unload()
    assert type(base[0]) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fast_and_the_same(copied):
    model, x = peft_model("int8"), torch.randn(3, 64)
    fastlora.optimize(model)
    other = copied(model)
    assert not fastlora.coverage(other).eager
    assert torch.equal(other(x), model(x))


def test_check_compares_them():
    model = peft_model("nf4", torch.bfloat16)
    report = fastlora.check(model, {"input": torch.randn(4, 64)})
    assert report
    assert report.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiled_without_a_break(kind):
    model = peft_model(kind)
    fastlora.optimize(model)
    x = torch.randn(3, 64, requires_grad=True)
    layer = model.base_model.model[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    (dx,), (expected_dx,) = (torch.autograd.grad(each.sum(), x) for each in (y, expected))
    torch.testing.assert_close(dx, expected_dx)
