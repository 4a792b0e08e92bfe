"""PEFT's layers over quantised layers of several vendors, with fastlora: their formula, no copy."""

import copy

import peft
import pytest
import torch
from memory import saved_bytes
from torch import nn
from transformers.integrations.gguf.utils import GgufLinear
from vendor_layers import KINDS as ALL_KINDS
from vendor_layers import quantised

import fastlora
from fastlora.peft.masks import shared_masks
from fastlora.quant import quantised_weight

K, N, R = 256, 96, 4
KINDS = [kind for kind in ALL_KINDS if kind != "torchao-int4-packed"]  # which PEFT refuses


def peft_model(kind: str, dtype=torch.float32, adapters=("default",), **settings) -> nn.Module:
    model = nn.Sequential(quantised(kind, K, N, dtype))
    model.hf_device_map = {"": "cpu"}  # PEFT asks a parameter else, and GPTQ's layers have none
    settings = {"r": R, "target_modules": ["0"], "init_lora_weights": False} | settings
    config = peft.LoraConfig(**settings)
    # PEFT knows transformers' GGUF layer no more than any custom one, and is told of it.
    config._register_custom_module({GgufLinear: peft.tuners.lora.Linear})
    model = peft.get_peft_model(model, config)
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model


def numbers(call, x: torch.Tensor, trained) -> list[torch.Tensor]:
    """The output, and the gradients of x and of all that trains."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]


def oracle(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The formula in float64, on the dequantised weight."""
    layer = model.base_model.model[0]
    base, trained = layer.base_layer, [p for p in model.parameters() if p.requires_grad]
    weight = quantised_weight(base).weight.dense(torch.float32).double()
    wide = [p.detach().double().requires_grad_() for p in trained]
    found = dict(zip(map(id, trained), wide, strict=True))

    def call(x):
        y = x @ weight.T + base.bias.double()
        for name in layer.active_adapters:
            a, b = (found[id(part[name].weight)] for part in (layer.lora_A, layer.lora_B))
            y = y + layer.scaling[name] * (x @ a.T @ b.T)
        return y

    return numbers(call, x.double(), wide)


def assert_close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).double().norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapters", [("default",), ("default", "other")], ids=["", "two"])
def test_the_numbers_are_the_formula_s(kind, adapters):
    model, x = peft_model(kind, adapters=adapters), torch.randn(3, 5, K)
    report = fastlora.optimize(model, strict=True)
    assert report.layers[0].packed
    trained = [p for p in model.parameters() if p.requires_grad]
    assert_close(numbers(model, x, trained), oracle(model, x), 2e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float8"])  # PEFT's needs a GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_numbers_are_pefts(kind, dtype):
    model, x = peft_model(kind, dtype, lora_dropout=0.3), torch.randn(3, 5, K).to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    with shared_masks(model):
        theirs = numbers(model, x, trained)
        fastlora.optimize(model, strict=True)
        ours = numbers(model, x, trained)
    assert [one.dtype for one in ours] == [one.dtype for one in theirs]
    assert_close(ours, theirs, 2e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantised_weight_is_kept(kind):
    model = peft_model(kind, lora_dropout=0.1)
    fastlora.optimize(model)
    layer = model.base_model.model[0]
    packed = quantised_weight(layer.base_layer).weight.tensors
    x = torch.randn(64, K, requires_grad=True)
    given = [x, *packed, *[p for p in layer.parameters() if p.requires_grad], layer.base_layer.bias]
    kept = saved_bytes(lambda: layer(x), apart_from=given)
    assert sum(kept.values()) <= 4 * 64 * R + 8


@pytest.mark.parametrize("kind", ["gguf-q8_0", "gguf-q4_k"])
def test_few_rows_of_gguf_need_no_kernel(kind):
    model = peft_model(kind)
    with pytest.raises(AttributeError):
        model(torch.randn(1, K))  # transformers' own
    fastlora.optimize(model)
    x = torch.randn(1, K)
    assert_close([model(x)], oracle(model, x)[:1], 1e-6)


def test_inputs_that_torchao_rounds_are_left_to_peft_and_the_report_says_why():
    model = peft_model("torchao-rounding")
    (layer,) = fastlora.optimize(model).eager
    assert "torchao gives no gradient" in layer.reason


@pytest.mark.parametrize("kind", KINDS)
def test_files_copies_and_the_way_back_stay_pefts(kind):
    model = peft_model(kind)
    before, classes = model.state_dict().keys(), [type(layer) for layer in model.modules()]
    fastlora.optimize(model)
    assert model.state_dict().keys() == before
    x = torch.randn(3, K)
    if kind != "hqq":  # made in inference mode, and torch copies no such tensor
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    fastlora.restore(model)
    assert [type(layer) for layer in model.modules()] == classes


@pytest.mark.parametrize("kind", ["torchao-int8", "gguf-q8_0"])
def test_an_adapter_of_16_bits_is_taken(kind):
    model, x = peft_model(kind, torch.bfloat16).bfloat16(), torch.randn(12, K).bfloat16()
    expected = model(x)
    report = fastlora.optimize(model, strict=True)
    assert "1 quantised" in str(report)
    assert_close([model(x)], [expected], 2e-2)


@pytest.mark.parametrize("kind", ["torchao-int8", "float8", "gguf-q8_0", "gptq"])
def test_compiled_without_a_break(kind):
    model, x = peft_model(kind), torch.randn(12, K, requires_grad=True)
    fastlora.optimize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ys = model(x), compiled(x)
    torch.testing.assert_close(*ys)
    for one, other in zip(*[torch.autograd.grad(y.sum(), x) for y in ys], strict=True):
        torch.testing.assert_close(one, other)
