"""Contestants for a layer with a quantized base.

The baseline is the frozen layer with the dequantized weight; no quantized layer can be faster.
"""

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import fastlora

from .cases import Case
from .contestants import (
    SCALE,
    Contestant,
    Group,
    Maker,
    Tensors,
    fastlora_layer,
    frozen,
    peft_group,
)


def layer_of(kind: str, K: int, N: int, dtype: torch.dtype) -> nn.Module:
    """A vendor's layer with random weights, without bias.  Skips the test without that vendor."""
    from vendor_layers import quantized

    torch.manual_seed(0)
    layer = quantized(kind, K, N, dtype)
    layer.bias = None
    return layer


def with_base(case: Case, tensors: Tensors) -> Tensors:
    """The tensors with the vendor's layer, and with its dequantized weight as weight."""
    from fastlora.formats import quantized_weight

    layer = layer_of(case.kind, case.K, *case.outputs, case.dtype)
    weight = quantized_weight(layer).weight.dense(case.dtype)
    return replace(tensors, weights=(nn.Parameter(weight, requires_grad=False),), base=layer)


def makers() -> dict[str, Maker]:
    return {
        "frozen": frozen,
        "dense base": fastlora_layer(),
        "peft": _peft,
        "peft, optimized": partial(_peft, optimized=True),
        "fastlora": _own,
    }


def _own(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    group = Group([copy.deepcopy(tensors.base)])
    settings = {"r": case.r, "lora_alpha": SCALE * case.r, "lora_dropout": dropout}
    fastlora.apply_lora(group, fastlora.LoRAConfig(target_modules=r"layers\.\d+", **settings))
    layer = group.train().layers[0]
    layer.lora_A, layer.lora_B = tensors.adapters[case.adapter_dtype][0]
    return Contestant(layer)


def _peft(case: Case, tensors: Tensors, dropout: float, optimized: bool = False) -> Contestant:
    """PEFT's layer, in training mode."""
    import peft
    from transformers.integrations.gguf.utils import GgufLinear

    base = Group([copy.deepcopy(tensors.base)])
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = case.kind == "int8", case.kind == "nf4"
    known = {GgufLinear: peft.tuners.lora.Linear}
    group = peft_group(case, tensors, dropout, optimized, base, known)
    return Contestant(group.layers[0], own_mask=True)
