"""A layer whose base is quantised: its rows, and who takes part.

The yardstick is the frozen layer with the dequantised weight, which no quantised one can beat.
"""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

import fastlora

from .cases import BF16, F32, Case
from .contestants import SCALE, Contestant, Group, Maker, Tensors, fastlora_layer, frozen

# Limits of forward + backward over the frozen dense layer's at 512 rows.
_OVER_DENSE = {"nf4": 1.2, "int8": 1.15, "torchao-int8": 1.2, "gguf-q8_0": 1.25, "gguf-q4_k": 1.4}
_OVER_PEFT = {2048: 0.85, 64: 1.05}  # at so many rows
_KEPT = 4.1  # MiB at 512 rows in float32, of which x is 4


@dataclass(frozen=True)
class Packed(Case):
    """``kind``: of the makers in ``tests/support``."""

    table: str = "quantised"

    @property
    def id(self) -> str:
        return super().id.replace("quantised", f"quantised-{self.kind}", 1)

    @property
    def targets(self) -> list[tuple[str, str, float]]:
        if self.tiny:
            return []
        found = [("peak", "fastlora/peft", 0.6)]
        if self.M in _OVER_PEFT:
            found.append(("both", "fastlora/peft", _OVER_PEFT[self.M]))
        elif self.dtype == F32:
            found.append(("both", "fastlora/frozen", _OVER_DENSE[self.kind]))
            found.append(("kept", "fastlora/MiB", _KEPT))
        return found


def cases() -> Iterator[Packed]:
    for kind in _OVER_DENSE:
        yield Packed(34, 256, (96,), 8, F32, F32, 0.1, "quick-quantised", kind=kind)
        case = Packed(512, 2048, (2048,), 16, F32, F32, 0.1, "quantised", kind=kind)
        yield from (case, replace(case, M=64), replace(case, M=2048))
        yield replace(case, dtype=BF16, adapter_dtype=BF16)


def layer_of(kind: str, K: int, N: int, dtype: torch.dtype) -> nn.Module:
    """A vendor's, of random weights, without bias; where it isn't installed the test is skipped."""
    if kind in ("nf4", "fp4", "int8"):
        from bnb_layers import quantised
    else:
        from vendor_layers import quantised
    torch.manual_seed(0)
    layer = quantised(kind, K, N, dtype).requires_grad_(False)
    layer.bias = None
    return layer


def with_base(case: Packed, tensors: Tensors) -> Tensors:
    """With the vendor's layer, and for a weight what it stands for."""
    from fastlora.quant import quantised_weight

    layer = layer_of(case.kind, case.K, *case.outputs, case.dtype)
    weight = quantised_weight(layer).weight.dense(case.dtype)
    return replace(tensors, weights=(nn.Parameter(weight, requires_grad=False),), base=layer)


def makers_for(case: Packed) -> dict[str, Maker]:
    return {
        "frozen": frozen,
        "dense base": fastlora_layer(),
        "peft": _peft,
        "peft, optimized": _optimized,
        "fastlora": _own,
    }


def _own(case: Packed, tensors: Tensors, dropout: float) -> Contestant:
    group = Group([copy.deepcopy(tensors.base)])
    settings = {"r": case.r, "lora_alpha": SCALE * case.r, "lora_dropout": dropout}
    fastlora.apply_lora(group, fastlora.LoRAConfig(target_modules=r"layers\.\d+", **settings))
    layer = group.train().layers[0]
    layer.lora_A, layer.lora_B = tensors.adapters[case.adapter_dtype][0]
    return Contestant(layer)


def _peft(case: Packed, tensors: Tensors, dropout: float) -> Contestant:
    return Contestant(_peft_group(case, tensors, dropout).layers[0], own_mask=True)


def _optimized(case: Packed, tensors: Tensors, dropout: float) -> Contestant:
    group = _peft_group(case, tensors, dropout)
    fastlora.optimize(group, strict=True)
    return Contestant(group.layers[0], own_mask=True)


def _peft_group(case: Packed, tensors: Tensors, dropout: float) -> Group:
    """PEFT's layer, in training mode."""
    import peft
    from transformers.integrations.gguf.utils import GgufLinear

    base = Group([copy.deepcopy(tensors.base)])
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = case.kind == "int8", case.kind == "nf4"
    config = peft.LoraConfig(
        r=case.r, lora_alpha=SCALE * case.r, lora_dropout=dropout, target_modules=r"layers\.\d+"
    )
    # PEFT doesn't know transformers' GGUF layer.
    config._register_custom_module({GgufLinear: peft.tuners.lora.Linear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()
    group = model.base_model.model
    layer = group.layers[0]
    pair = tensors.adapters[case.adapter_dtype][0]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = pair
    return group
