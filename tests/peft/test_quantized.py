"""PEFT layers on vendors' quantized layers: PEFT's numbers, and no dense copy of the weight."""

import copy

import peft
import pytest
import torch
from judge import saved_bytes
from models import assert_near, numbers
from peft.tuners.lora.awq import AwqLoraLinear
from torch import nn
from torch.utils.checkpoint import checkpoint
from vendor_layers import BITSANDBYTES, KINDS, AwqTorchLinear, GgufLinear, quantized, repack

import fastlora
from fastlora.formats import quantized_weight
from fastlora.peft.baseline import shared_masks

K, N, R, F32 = 256, 96, 4, torch.float32
# PEFT refuses torchao's packed int4.
KINDS = [kind for kind in (*KINDS, *BITSANDBYTES) if kind != "torchao-int4-packed"]
needs_bitsandbytes = pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes isn't installed")


def peft_model(kind: str, dtype=torch.float32, adapters=("default",), **settings) -> nn.Module:
    """A model of one layer, with adapters that change its output."""
    model = nn.Sequential(quantized(kind, K, N, dtype))
    if kind in BITSANDBYTES:
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"
    else:
        # otherwise PEFT asks a parameter for its device, and GPTQ's layers have none
        model.hf_device_map = {"": "cpu"}
    settings = {"r": R, "target_modules": ["0"], "init_lora_weights": False} | settings
    config = peft.LoraConfig(**settings)
    # PEFT doesn't know transformers' GGUF layer, and AWQ's only if GPTQ-Model is installed.
    kinds = {GgufLinear: peft.tuners.lora.Linear}
    kinds |= {AwqTorchLinear: AwqLoraLinear} if kind == "awq" else {}
    config._register_custom_module(kinds)
    model = peft.get_peft_model(model, config)
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_peft_s(model: nn.Module, x: torch.Tensor, tolerance: float, autocast=False) -> None:
    """The fast numbers of a layer with a quantized base agree with PEFT's."""
    with shared_masks(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = numbers(model, x)
        report = fastlora.coverage(fastlora.optimize(model, strict=True))
        ours = numbers(model, x)
    assert report.layers[0].packed
    assert [one.dtype for one in ours] == [one.dtype for one in theirs]
    assert_near(ours, theirs, tolerance)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float8"])  # PEFT's needs a GPU
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_numbers_are_pefts_and_check_says_so(kind, dtype):
    model, tolerance = peft_model(kind, dtype, lora_dropout=0.3), 2e-6 if dtype == F32 else 0.02
    x = torch.randn(3, 5, K).to(dtype).requires_grad_()
    assert "1 of 1 fast layers judged, all right" in str(fastlora.check(model, x))
    assert_peft_s(model, x, tolerance)


CASES = {
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
    "bias": {"bias": "all", "lora_bias": True},
    "two": {"adapters": ("default", "other")},
}


@needs_bitsandbytes
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_kinds_of_adapters(settings):
    assert_peft_s(peft_model("nf4", **settings), torch.randn(3, 5, K), 2e-6)


@needs_bitsandbytes
def test_dtypes_of_x_and_autocast():
    assert_peft_s(peft_model("nf4", torch.bfloat16), torch.randn(3, 5, K), 0.02)
    for kind in ("nf4", "int8"):
        assert_peft_s(peft_model(kind), torch.randn(3, 5, K), 0.03, autocast=True)


@pytest.mark.parametrize("kind", KINDS)
def test_only_x_and_h_are_saved_and_files_copies_and_restore_stay_peft_s(kind):
    """No dequantized weight is saved for the backward, and no dropped x, which PEFT also saves."""
    model = peft_model(kind, lora_dropout=0.1)
    before, classes = model.state_dict().keys(), [type(layer) for layer in model.modules()]
    fastlora.optimize(model)
    assert model.state_dict().keys() == before
    layer, x = model.base_model.model[0], torch.randn(64, K, requires_grad=True)
    packed = quantized_weight(layer.base_layer).weight.tensors
    kept = saved_bytes(lambda: layer(x), [x, *packed, *trained(layer), layer.base_layer.bias])
    assert sum(kept.values()) <= 4 * 64 * R + 8
    if kind != "hqq":  # HQQ's tensors are made in inference mode, and torch can't copy them
        assert torch.equal(copy.deepcopy(model.eval())(x), model(x))
    fastlora.restore(model)
    assert [type(layer) for layer in model.modules()] == classes


@needs_bitsandbytes
def test_a_reference_forward_before_a_recomputation():
    """bitsandbytes' first forward casts the bias, and the recomputation must save the same."""
    model, x = peft_model("nf4", torch.bfloat16), torch.randn(3, K)
    assert model.base_model.model[0].base_layer.bias.dtype == F32
    fastlora.optimize(model)
    y = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    with torch.no_grad(), model.disable_adapter():
        model(x)
    y.sum().backward()
    assert x.grad.isfinite().all()


@needs_bitsandbytes
@pytest.mark.parametrize("evaluated", ["before", "after"])
def test_frozen_four_bit_layers_give_x_its_gradient_after_an_evaluation(evaluated):
    """On a CPU with AVX512-BF16, bitsandbytes repacks the weight and then gives x no gradient."""
    base = nn.Sequential(quantized("nf4", K, 128), quantized("nf4", 128, 64))
    base.is_loaded_in_4bit = True
    x, frozen = torch.randn(5, K), base[1]
    model = peft.get_peft_model(base, peft.LoraConfig(r=R, target_modules=["0"]))
    weight = quantized_weight(frozen).weight.dense(F32)
    if evaluated == "before":
        repack(frozen)
    fastlora.optimize(model)
    with torch.no_grad():
        model.eval()(x)
    (lora_b,) = model.base_model.model[0].lora_B.parameters()
    (found,) = torch.autograd.grad(model.train()(x).sum(), lora_b)
    (expected,) = torch.autograd.grad((base[0](x) @ weight.T).sum(), lora_b)
    bits = 8 if evaluated == "before" else 17  # repacking rounds to bfloat16
    assert (found - expected).norm() <= 2**-bits * expected.norm()
    repacks = type(frozen)(8, 8).support_avx512bf16_for_cpu
    fastlora.restore(model)
    assert frozen.support_avx512bf16_for_cpu == repacks


def test_inputs_that_torchao_rounds_are_left_to_peft_and_the_report_says_why():
    (layer,) = fastlora.coverage(fastlora.optimize(peft_model("torchao-rounding"))).not_fast
    assert "torchao gives no gradient" in layer.reason


@pytest.mark.parametrize("kind", ["torchao-int8", "gptq", *BITSANDBYTES[:1]])
def test_compiled_without_a_break(kind):
    model, x = peft_model(kind), torch.randn(12, K, requires_grad=True)
    fastlora.optimize(model)
    compiled = torch.compile(model.base_model.model[0], fullgraph=True, backend="aot_eager")
    ys = model(x), compiled(x)
    torch.testing.assert_close(*ys)
    torch.testing.assert_close(*[torch.autograd.grad(y.sum(), x) for y in ys])
