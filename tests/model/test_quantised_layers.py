"""apply_lora on quantised layers of several vendors: the formula on the dequantised weight."""

import copy

import pytest
import torch
from torch import nn
from vendor_layers import KINDS
from vendor_layers import quantised as of_vendors

import fastlora
from fastlora.quant import quantised_weight

K = 256


def quantised(kind: str, *sizes, **settings) -> nn.Module:
    if kind not in ("nf4", "int8"):
        return of_vendors(kind, *sizes, **settings)
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    import bnb_layers

    return bnb_layers.quantised(kind, *sizes, **settings)


def adapted(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    """A model of one layer, and its dequantised weight."""
    torch.manual_seed(0)
    model = nn.Sequential(quantised(kind, K, dtype=dtype))
    weight = quantised_weight(model[0]).weight.dense(torch.float32).double()
    fastlora.apply_lora(model, fastlora.LoRAConfig(r=4, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B)
    return model, weight


@pytest.mark.parametrize("kind", ["nf4", "int8", *KINDS])
def test_outputs_and_gradients(kind):
    model, weight = adapted(kind)
    layer, x = model[0], torch.randn(5, K, requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B]
    y = model(x)
    found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z, a, b = wide
    y = z @ weight.T + layer.bias.double() + layer.scaling * (z @ a.T @ b.T)
    expected = [y, *torch.autograd.grad(y.square().sum(), wide)]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gptq"])
def test_merged_without_packing_and_back(kind):
    model, _ = adapted(kind)
    plain, x = type(model[0]).plain_class, torch.randn(5, K)
    y = model.eval()(x)
    fastlora.merge_lora(model, requantise=False)
    torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
    copied = copy.deepcopy(model) if kind != "hqq" else model  # its bias is no leaf
    model.to("cpu")._apply(torch.clone)  # as a move to another device makes all tensors anew
    for one in {model, copied}:
        fastlora.unmerge_lora(one)
        assert torch.equal(one(x), y)
    fastlora.remove_lora(model)
    assert type(model[0]) is plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gptq"])
def test_merged_without_packing_it_has_the_model_s_dtype(kind, dtype):
    model = nn.Sequential(nn.LayerNorm(K, dtype=dtype), quantised(kind, K, dtype=dtype))
    fastlora.apply_lora(model, fastlora.LoRAConfig(r=4, target_modules=["1"])).eval()
    nn.init.normal_(model[1].lora_B, std=0.1)
    x, close = torch.randn(5, K, dtype=dtype), 0.02 if dtype == torch.bfloat16 else 0.003
    y = model(x)
    fastlora.merge_lora(model, requantise=False)
    assert (model(x) - y).norm() <= close * y.norm()
    fastlora.remove_lora(model)
    assert (type(model[1]), model[1].weight.dtype) == (nn.Linear, dtype)
    assert (model(x) - y).norm() <= close * y.norm()


@pytest.mark.parametrize(
    ("kind", "error"),
    [("torchao-int8", 0.02), ("torchao-float8", 0.05), ("hqq", 0.12)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")  # that it isn't the same
def test_merged_into_a_packed_weight_and_back(kind, error, dtype):
    model, _ = adapted(kind, dtype)
    x = torch.randn(5, K, dtype=dtype)
    y = model.eval()(x)
    fastlora.merge_lora(model)
    assert (model(x) - y).norm() <= error * y.norm()
    fastlora.unmerge_lora(model)
    assert torch.equal(model(x), y)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_float8_is_packed_by_transformers_quantiser():
    """Whose own call needs a kernel that isn't here."""
    model, _ = adapted("float8")
    layer, x = model[0], torch.randn(5, K)
    y, wanted = model(x), layer.merged_weight(torch.float32)
    fastlora.merge_lora(model)
    found = layer.packed().weight.dense(torch.float32)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    fastlora.unmerge_lora(model)
    assert torch.equal(model(x), y)


def test_the_state_dict_of_hqq_s_layer_has_the_adapter_and_loads_it():
    model, _ = adapted("hqq")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert state.keys() >= {"0.W_q", "0.lora_A", "0.lora_B"}
    x = torch.randn(3, K)
    expected = model(x)
    for name in ("lora_A", "lora_B"):
        nn.init.zeros_(getattr(model[0], name))
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("requantise", [True, False])
def test_gptq_model_s_layer_takes_no_merged_weight(requantise):
    model, _ = adapted("gptq")
    x = torch.randn(3, K)
    y = model.eval()(x)
    with pytest.raises(ValueError, match="GPTQ"):
        fastlora.merge_lora(model, requantise=requantise)
    assert torch.equal(model(x), y)


def test_what_can_t_be_merged_or_adapted_is_said_and_nothing_changes():
    model, _ = adapted("gguf-q4_k")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="GGUF's blocks are read, and not made"):
        fastlora.merge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0].merged
    rounding = nn.Sequential(quantised("torchao-rounding", K))
    with pytest.raises(ValueError, match="torchao gives no gradient"):
        fastlora.apply_lora(rounding, fastlora.LoRAConfig(target_modules=["0"]))
