"""A packed base is dense while an adapter is merged into it, and gets its packed bits back."""

import peft
import pytest
import torch
from torch import nn
from vendor_layers import BITSANDBYTES, KINDS, quantized

import fastlora
from fastlora.formats import weight_of

SIZES = 256, 96
# PEFT's layers of GPTQ-Model's can't be merged.
KINDS = [kind for kind in (*KINDS, *BITSANDBYTES) if kind not in ("gptq", "awq")]


def packed_model(kind: str, dtype=torch.float32) -> nn.Module:
    """PEFT's plain layer over the packed base, as PEFT makes it for a base it doesn't know."""
    torch.manual_seed(0)
    linears = nn.Sequential(nn.Linear(*SIZES, dtype=dtype), nn.LayerNorm(SIZES[1], dtype=dtype))
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(linears, config).eval()
    model.base_model.model[0].base_layer = quantized(kind, *SIZES, dtype)
    return model


def merged_by_hand(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layer, norm = model.base_model.model
    weight = weight_of(layer.base_layer).weight.dense(torch.float32)
    bias = layer.base_layer.bias
    with torch.no_grad():
        weight = weight + layer.get_delta_weight("default")
        y = nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
        return norm(y.to(x.dtype))


PACKED = [
    pytest.param(kind, dtype, id=f"{kind}-{name}")
    for kind in (*KINDS, "rotated-int8")
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))
]


@pytest.mark.parametrize(("kind", "dtype"), PACKED)
@pytest.mark.parametrize("way", ["merged", "merged-optimized", "merge_adapter"])
@torch.no_grad()
def test_a_packed_base_is_dense_while_it_is_merged(kind, way, dtype):
    model = packed_model(kind, dtype)
    layer = model.base_model.model[0]
    base, x = layer.base_layer, torch.randn(5, SIZES[0], dtype=dtype)
    before = weight_of(base).weight
    bits = [tensor.clone() for tensor in before.tensors]
    expected = merged_by_hand(model, x)
    if way != "merged":
        fastlora.optimize(model)
    if way == "merge_adapter":
        model.merge_adapter()
        found = model(x)
        model.unmerge_adapter()
    else:
        with fastlora.merged(model):
            found = model(x)
            with model.disable_adapter():
                assert layer.base_layer is base
            assert layer.merged
    assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.01) * expected.norm()
    assert layer.base_layer is base
    assert all(map(torch.equal, weight_of(base).weight.tensors, bits))


@pytest.mark.parametrize("kind", ["nf4", "int8", "float8", "gguf-q8_0", "torchao-int8"])
@torch.no_grad()
def test_merge_and_unload_gives_a_dense_layer_where_peft_can_t_quantize(kind):
    model = packed_model(kind)
    x = torch.randn(5, SIZES[0])
    expected = merged_by_hand(model, x)
    unloaded = fastlora.optimize(model).merge_and_unload()
    assert isinstance(unloaded[0], nn.Linear)
    assert unloaded[0].weight.dtype == torch.float32
    torch.testing.assert_close(unloaded(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_can_t_be_read_is_named():
    model = packed_model("torchao-rounding")
    with pytest.raises(ValueError, match="0 can't be merged"):
        fastlora.merged(model).__enter__()


def test_optimize_after_merge_and_unload_says_that_the_layers_are_gone():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(*SIZES)), peft.LoraConfig(target_modules=["0"])
    )
    model.merge_and_unload()
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) or unload\(\) took them away"):
        fastlora.optimize(model)
