"""Gated MLPs of quantized layers as fused blocks."""

import peft
import pytest
import torch
from judge import saved_bytes
from models import assert_near, counted_blocks, numbers
from peft.tuners.lora.awq import AwqLoraLinear
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from vendor_layers import BITSANDBYTES, KINDS, AwqTorchLinear, quantized

import fastlora
from fastlora.layers import mlp
from fastlora.layers.classes import change_classes, own_classes
from fastlora.peft.baseline import shared_masks
from fastlora.projection import flatten, layouts_of

# On any CPU, bitsandbytes itself reads rows of whole blocks of 64 correctly.
IN, HIDDEN, ROWS, R = 64, 128, 40, 3
# GGUF's wider blocks don't fit these sizes, and PEFT has no layer for torchao's packed int4.
LEFT_OUT = ("gguf-q4_k", "torchao-int4-packed")
KINDS = [kind for kind in (*BITSANDBYTES, *KINDS) if kind not in LEFT_OUT]
ROTATED = "rotated-int8"  # fastlora's own


def frozen(kinds, compute=torch.float32) -> nn.Module:
    """A Llama's MLP of quantized layers: one kind, or one kind each for gate, up and down.

    "dense" is torch.nn.Linear.
    """
    kinds = (kinds,) * 3 if isinstance(kinds, str) else kinds
    block = LlamaMLP(LlamaConfig(hidden_size=IN, intermediate_size=HIDDEN))
    for name, kind in zip(mlp.PARTS, kinds, strict=True):
        sizes = (HIDDEN, IN) if name == "down_proj" else (IN, HIDDEN)
        layer = quantized(kind, *sizes, compute) if kind != "dense" else nn.Linear(*sizes)
        setattr(block, name, layer.requires_grad_(False))
    model = nn.Sequential(block)
    model.hf_device_map = {
        "": "cpu"
    }  # PEFT asks a parameter otherwise, and GPTQ's layers have none
    return model


def peft_s(model: nn.Module, **settings) -> nn.Module:
    """A PEFT model that isn't optimized yet."""
    settings = {"r": R, "target_modules": list(mlp.PARTS), "init_lora_weights": False} | settings
    config = peft.LoraConfig(**settings)
    return peft.get_peft_model(model, config)


def optimized(model: nn.Module, **settings) -> nn.Module:
    settings = {"r": R, "target_modules": list(mlp.PARTS), "init_lora_weights": False} | settings
    config = peft.LoraConfig(**settings)
    config._register_custom_module({AwqTorchLinear: AwqLoraLinear})
    return fastlora.get_peft_model(model, config, strict=True)


def x_of(dtype=torch.float32) -> Tensor:
    x = torch.randn(2, ROWS, IN, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def by_layers(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The same numbers computed layer by layer, after the blocks were removed."""
    assert len(change_classes(own_classes(model.modules(), mlp.GatedMLP))) == 1
    return numbers(model, x)


MIXED = ("nf4", "dense", "gguf-q8_0")


@pytest.mark.parametrize("kinds", [*KINDS, ROTATED, MIXED], ids=str)
def test_a_fused_block_agrees_with_its_layers(kinds):
    model, x = optimized(frozen(kinds)), x_of()
    assert "1 of 1 gated MLPs as one block" in str(fastlora.coverage(model))
    with counted_blocks() as calls:
        found = numbers(model, x)
    assert len(calls) == 1
    assert_near(found, by_layers(model, x), 3e-6)


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8", "gguf-q8_0"])
def test_it_saves_gate_up_and_h_besides_the_packed_tensors(kind):
    model, x = optimized(frozen(kind), lora_dropout=0.1), x_of()
    block = model.base_model.model[0]
    outputs = [block.read_part(getattr(block, name)).output for name in mlp.PARTS]
    tensors = flatten(outputs, layouts_of(outputs))
    kept = sum(saved_bytes(lambda: model(x), apart_from=[x, *tensors]).values())
    seeds = 3 * 8
    assert kept == 4 * 2 * ROWS * (2 * HIDDEN + 3 * R) + seeds


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {  # dtypes: compute_dtype, x's, autocast's; then whether the call is fused
    "all-16-bits": (BF16, BF16, None, True),
    "float32-between-16-bit-layers": (BF16, F32, None, True),
    "under-autocast": (BF16, F32, BF16, True),
    "16-bits-under-autocast": (BF16, BF16, BF16, True),
    "float32-layers-under-autocast": (F32, F32, BF16, True),
    "none-of-its-own": (None, F32, None, True),
    "rounded-between-float32-layers": (F32, BF16, None, False),
    "rounded-twice": (F16, F32, BF16, False),
    "float64": (F32, torch.float64, None, False),
}


@pytest.mark.parametrize(("compute", "of_x", "cast", "fast"), DTYPES.values(), ids=DTYPES)
def test_the_dtypes_of_a_layer_that_computes_in_one_of_its_own(compute, of_x, cast, fast):
    model, x = optimized(frozen("nf4", compute)), x_of(of_x)
    with torch.autocast("cpu", cast or BF16, enabled=cast is not None):
        with counted_blocks() as calls:
            found = numbers(model, x)
        expected = by_layers(model, x)
    assert len(calls) == fast
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert found[0].dtype == of_x
    y, dx, *rest = zip(found, expected, strict=True)
    assert_near(*zip(y, *rest, strict=True), 1e-6)
    # The parts of gate and up are summed in the dtype that they compute in.
    assert_near(*zip(dx, strict=True), 1e-6 if compute in (None, F32) and not cast else 0.01)


def test_pefts_numbers_with_its_masks():
    model, x = peft_s(frozen("nf4"), lora_dropout=0.3), x_of()
    with shared_masks(model):
        expected = numbers(model, x)
        fastlora.optimize(model, strict=True)
        with counted_blocks() as calls:
            found = numbers(model, x)
    assert len(calls) == 1
    assert_near(found, expected, 3e-6)


def computes_in_another(block):
    block.up_proj.base_layer.compute_dtype = torch.bfloat16


def broken(block):
    block.up_proj.base_layer.weight.quant_state.absmax = torch.ones(1)


LEFT = {
    "compute": (computes_in_another, "its layers have different dtypes"),
    "broken": (broken, "its up_proj: its base is a Linear4bit: its quantization state is broken"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT.values(), ids=LEFT)
def test_a_call_goes_layer_by_layer(change, reason):
    model, x = optimized(frozen("nf4")), x_of()
    change(model.base_model.model[0])
    (block,) = fastlora.coverage(model).gated_mlps
    assert reason in block.reason
    with counted_blocks() as calls:
        model(x)
    assert not calls


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_layer_without_an_adapter_that_rounds_its_input_stays_its_own(kind):
    model = optimized(frozen(kind), target_modules=["up_proj"])
    (block,) = fastlora.coverage(model).gated_mlps
    assert "without an adapter, whose own forward rounds its input" in block.reason
