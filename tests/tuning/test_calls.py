"""The products that tuning measures are the products of a training step."""

import peft
import pytest
import torch
from marks import DEVICE
from models import Mlp, adapt, tiny_llama
from moe_models import base_model, parameters_of
from vendor_layers import quantized

import fastlora
from fastlora.backends.triton.plans import PlanRunner
from fastlora.backends.triton.supported import kernels
from fastlora.kernels.launch import intercept
from fastlora.layers.classes import change_classes
from fastlora.layers.mlp import gated_classes
from fastlora.tuning.calls import products_of

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter stands in for a GPU")
CPU, TOKENS = torch.device("cpu"), 36
IDS = torch.randint(0, 60, (2, TOKENS // 2))


def llama(**settings):
    return tiny_llama(num_hidden_layers=1, **settings)


def adapted(p=0.0, optimized=True, **settings):
    config = peft.LoraConfig(r=4, lora_dropout=p, target_modules="all-linear")
    model = peft.get_peft_model(llama(**settings), config)
    if optimized:
        fastlora.optimize(model)
    return model


def two_adapters():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=8, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    fastlora.optimize(model)
    return model


def mixture():
    names = {"target_modules": ["q_proj"], "target_parameters": parameters_of("qwen3")}
    return adapt(base_model("qwen3", num_hidden_layers=1), r=2, **names)


MODELS = {
    "plain": adapted,
    "dropout": lambda: adapted(0.1),
    "bfloat16": lambda: adapted(dtype=torch.bfloat16),
    "two adapters": two_adapters,
    "experts": mixture,
}


def asked_for(model, monkeypatch) -> set[tuple]:
    """The sizes of the calls for which a training step of the model chooses a plan."""
    asked = set()
    real = kernels.plan_for

    def plan_for(
        x, n, k, ranks, precision, *, masked=False, backward=False, packed=False, segments=0
    ):
        size = (len(x), n, k, max(ranks), x.element_size(), masked, len(ranks), backward, segments)
        asked.add(size)
        options = {"masked": masked, "backward": backward, "packed": packed, "segments": segments}
        return real(x, n, k, ranks, precision, **options)

    monkeypatch.setattr(kernels, "plan_for", plan_for)
    # a call with a known cache key chooses no plan
    monkeypatch.setattr("fastlora.ops.kinds.calls", {})
    with fastlora.use_backend("triton"), intercept(lambda launch: None):  # no kernel has to run
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    return asked


def measured(model, **options) -> set[tuple]:
    found = set()
    products, notes = products_of(model, TOKENS, options.get("dtype"))
    assert notes == []
    for product in products:
        row = PlanRunner(product, CPU).row(kernels.plan.IN_PLACE)
        size = (row.m, row.n, row.k, row.r, row.itemsize, row.masked, row.projections)
        found.add((*size, row.backward, row.segments))
    assert len(found) == len(products)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_measured_products_match_a_training_step(name, monkeypatch):
    model = MODELS[name]()
    found, asked = measured(model), asked_for(model, monkeypatch)
    assert found >= asked
    assert not {size for size in found - asked if not size[7]}  # the first layer has no dx


def test_layers_that_are_not_optimized_count_and_their_mlp_is_no_block():
    for optimized, groups in ((False, [(96,)]), (True, [(96, 96)])):
        products, _ = products_of(adapted(optimized=optimized), TOKENS, None)
        assert [each.outs for each in products if each.backward] == [(64,), (32,), *groups, (64,)]


def test_packed_weights_count_as_dense_16_bit_weights_unless_a_dtype_is_given():
    pytest.importorskip("gguf", reason="needs gguf")
    model = adapt(torch.nn.Sequential(quantized("gguf-q8_0")), r=4, target_modules=["0"])
    for dtype, found in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        products, notes = products_of(model, TOKENS, dtype)
        assert (notes, {each.dtype for each in products}) == ([], {found})


def test_layers_without_an_active_adapter_are_noted():
    model = Mlp()
    fastlora.replace_linears(model, ["up", "down"], r=4, lora_alpha=8)
    for layer in (model.up, model.down):
        layer.merge()
    assert products_of(model, TOKENS, None) == ([], ["2 layers weren't measured: merged"])
    model = adapted()
    with model.disable_adapter():
        assert products_of(model, TOKENS, None) == ([], ["7 layers weren't measured: disabled"])


def test_a_model_on_meta_has_the_same():
    with torch.device("meta"):
        model = llama()
        fastlora.replace_linears(model, r".*_proj", r=4, lora_alpha=8)
        change_classes(gated_classes(model.modules()))
    assert products_of(model, TOKENS, None) == products_of(adapted(), TOKENS, None)
