"""What the report on a PEFT model says: shares, kinds of layers, layers that nothing calls."""

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import fastlora
from fastlora.report import Coverage, LayerCoverage


class Experts(nn.Module):
    """Eight experts of one parameter, and a router beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 8, bias=False)
        self.up_proj = nn.Parameter(torch.randn(8, 16, 8))

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        return torch.einsum("be,eni,bi->bn", weights, self.up_proj, x)


def test_the_share_of_adapted_parameters_says_what_the_count_hides():
    config = peft.LoraConfig(target_modules=["router"], target_parameters=["experts.up_proj"])
    model = peft.get_peft_model(nn.ModuleDict({"experts": Experts()}), config)
    report = fastlora.optimize(model)
    assert {layer.parameters for layer in report.layers} == {8 * 8, 8 * 16 * 8}
    assert report.share == 64 / (64 + 1024)
    first, *rest = str(report).splitlines()
    assert first == "1 of 2 layers fast, 6 % of the adapted parameters (backend torch)"
    assert "its forward isn't that of transformers' use_experts_implementation" in rest[0]
    assert "ParamWrapper" not in str(report)


def parts(*sizes: int, fast: int) -> Coverage:
    """The first ``fast`` of layers with so many parameters are fast."""
    layers = [
        LayerCoverage("", (1, size), 4, i < fast, "torch" if i < fast else "eager", parameters=size)
        for i, size in enumerate(sizes)
    ]
    return Coverage(tuple(layers))


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (parts(1, 999, fast=1), "1 of 2 layers fast, under 1 % of the adapted parameters"),
        (parts(999, 1, fast=1), "1 of 2 layers fast, over 99 % of the adapted parameters"),
        (parts(3, 97, fast=1), "1 of 2 layers fast, 3 % of the adapted parameters"),
        (parts(3, 97, fast=2), "2 of 2 layers fast"),
        (parts(3, 97, fast=0), "0 of 2 layers fast"),
        (parts(0, 0, fast=1), "1 of 2 layers fast"),
    ],
    ids=["tiny", "most", "some", "all", "none", "unknown"],
)
def test_the_share_is_given_where_some_layers_are_fast(report, text):
    assert report.counts == text


def test_check_gives_the_share_too():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"]))
    text = str(fastlora.check(model, torch.tensor([[1, 2]])))
    assert text.startswith("fastlora (1 of 2 layers fast, 47 % of the adapted parameters) and PEFT")


def test_the_parameters_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    assert fastlora.coverage(model).layers[0].parameters == model.base_model.model[0].weight.numel()


# Layers that nothing calls


def encoder_layer(*targets: str, **settings) -> peft.PeftModel:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **settings)
    config = peft.LoraConfig(target_modules=list(targets), init_lora_weights=False)
    return peft.get_peft_model(nn.Sequential(layer), config)


def without_adapter(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with model.disable_adapter():
        return model(x)


def test_out_proj_of_torch_s_attention_is_said_not_to_be_called():
    model, x = encoder_layer("out_proj"), torch.randn(2, 3, 8)
    assert torch.equal(model(x), without_adapter(model, x))
    report = fastlora.optimize(model)
    assert report.fast == ()
    assert "out_proj: nothing calls it: torch.nn.MultiheadAttention reads its weight" in str(report)
    assert torch.equal(model(x), without_adapter(model, x))
    with pytest.raises(ValueError, match="nothing calls it"):
        fastlora.optimize(model, strict=True)


def test_out_proj_of_peft_s_attention_is_merged_by_it():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    report = fastlora.optimize(
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"]))
    )
    assert "out_proj: nothing calls it: torch.nn.MultiheadAttention reads its" in str(report)
    assert "attention: only PEFT's lora.Linear is sped up, not MultiheadAttention" in str(report)


class Shapeless(nn.Module):
    """A layer of one's own, without in_features and out_features."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


class ShapelessLora(nn.Module, LoraLayer):
    def __init__(self, base_layer, adapter_name, **_):
        super().__init__()
        LoraLayer.__init__(self, base_layer)

    def update_layer(self, *_, **__):
        pass


def test_a_custom_layer_without_a_shape_is_reported():
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        layer = ShapelessLora(Shapeless(), "default")
    assert layer.in_features is None
    (found,) = fastlora.coverage(nn.Sequential(layer)).layers
    assert not found.fast
    assert found.parameters == 0
