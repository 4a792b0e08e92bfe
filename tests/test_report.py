"""coverage(model): a record for each adapted layer, and a short report."""

import torch
from models import Mlp

import fastlora
from fastlora import LoRAConfig


def adapted():
    return fastlora.apply_lora(Mlp(), LoRAConfig(r=4, target_modules=["up", "down"]))


def test_every_adapted_layer_has_a_record():
    report = fastlora.coverage(adapted())
    assert [
        (layer.name, layer.shape, layer.r, layer.fast, layer.plan) for layer in report.layers
    ] == [("up", (12, 8), 4, True, "torch"), ("down", (8, 12), 4, True, "torch")]
    assert str(report) == "2 of 2 layers fast (backend torch)"
    assert report.eager == ()


def test_a_merged_layer_says_so():
    report = fastlora.coverage(fastlora.merge_lora(adapted()))
    assert {layer.plan for layer in report.layers} == {"merged"}
    assert str(report) == "2 of 2 layers fast (2 merged)"


def test_a_replaced_forward_is_eager_with_its_reason():
    model = adapted()
    model.up.forward = lambda x: x
    report = fastlora.coverage(model)
    assert [layer.name for layer in report.eager] == ["up"]
    assert str(report) == (
        "1 of 2 layers fast, 50 % of the adapted parameters (backend torch)\n"
        "1 eager: up: its forward was replaced on the instance, so fastlora's isn't called"
    )


def test_a_layer_that_the_kernels_do_not_cover_says_why():
    model = adapted()
    model.up.double()
    with fastlora.use_backend("triton"):
        report = fastlora.coverage(model)
    assert [layer.plan for layer in report.layers] == ["torch", "triton"]
    assert str(report) == (
        "2 of 2 layers fast (backend torch; backend triton)\n"
        "1 on torch: up: the Triton kernels don't have torch.float64"
    )


def test_a_plain_model():
    report = fastlora.coverage(Mlp())
    assert report.layers == ()
    assert "apply_lora" in str(report)


def test_it_sees_through_wrappers():
    assert len(fastlora.coverage(torch.nn.DataParallel(adapted())).layers) == 2
