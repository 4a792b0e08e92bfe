"""The kinds of adapted models: fastlora's own layers and PEFT's, over each kind of base."""

from collections.abc import Callable
from typing import Any, NamedTuple

from models import Mlp, Tied
from moe_models import base_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D
from vendor_layers import BITSANDBYTES, quantized

import fastlora

_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Kind(NamedTuple):
    """``words``: selects the changes that this kind takes (the keys of ``CHANGES``).  ``size``: the
    number of columns of x; None if x holds ids.
    """

    words: str
    make: Callable[[], nn.Module]
    settings: dict[str, Any]
    size: int | None


def _block() -> nn.Module:
    return nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)))


def _transposed() -> nn.Module:
    return nn.Sequential(Conv1D(24, 32), nn.GELU(), Conv1D(8, 24))


def _over_nf4() -> nn.Module:
    model = nn.Sequential(quantized("nf4", 64, 32), nn.GELU(), nn.Linear(32, 64))
    model.is_loaded_in_4bit = True  # PEFT looks for this attribute of the model
    return model


def _mixture(packed: str = "") -> nn.Module:
    mixture = nn.Sequential(base_model(moe_intermediate_size=32).model.layers[0].mlp)
    if packed:
        fastlora.pack(mixture, packed)
    return mixture


# Settings of the adapters.
_UP_DOWN, _ALL = {"target_modules": ["up", "down"]}, {"target_modules": "all-linear"}
_UP = {"target_modules": ["up"]}
_SAVED = {"target_modules": ["mix"], "modules_to_save": ["head"]}
_EMBEDDED = {"target_modules": ["mix", "embed"]}
_BOTH = {"target_modules": ["0", "2"]}
_STACKS = {"target_modules": [], "target_parameters": _EXPERTS}
_ROUTED = _STACKS | {"target_parameters": ["gate.weight", *_EXPERTS]}
KINDS = {
    "linear": Kind("own linear drops", Mlp, _UP_DOWN, 8),
    "saved": Kind("own linear drops", Tied, _SAVED, None),
    "conv1d": Kind("own linear drops", _transposed, _ALL, 32),
    "block": Kind("own linear drops activates", _block, _ALL, 32),
    "experts": Kind("own experts drops activates", _mixture, _STACKS, 32),
    "router": Kind("own experts activates", _mixture, _ROUTED, 32),
    "packed-experts": Kind("own experts drops packed", lambda: _mixture("nf4"), _STACKS, 32),
    "peft": Kind("peft linear drops", Mlp, _UP, 8),
    "peft-saved": Kind("peft linear drops", Tied, _SAVED | _EMBEDDED, None),
    "peft-dora": Kind("peft linear drops", Mlp, _UP | {"use_dora": True}, 8),
    "peft-conv1d": Kind("peft linear drops", _transposed, _BOTH | {"fan_in_fan_out": True}, 32),
    "peft-block": Kind("peft linear drops activates", _block, _ALL, 32),
    "peft-experts": Kind("peft experts activates", _mixture, _STACKS, 32),
}  # fmt: skip
if BITSANDBYTES:
    KINDS["quantized"] = Kind("own linear drops packed", _over_nf4, _BOTH, 64)
    KINDS["peft-quantized"] = Kind("peft linear drops packed", _over_nf4, _BOTH, 64)
