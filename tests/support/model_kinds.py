"""The kinds of adapted models: LoRALinear, and PEFT's layers over each kind of base."""

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
_UP = {"target_modules": ["up"]}
_EMBEDDED = {"target_modules": ["mix", "embed"], "modules_to_save": ["head"]}
_BOTH, _ALL = {"target_modules": ["0", "2"]}, {"target_modules": "all-linear"}
_STACKS = {"target_modules": [], "target_parameters": _EXPERTS}
KINDS = {
    "own": Kind("own linear drops", Mlp, {"targets": ["up", "down"]}, 8),
    "linear": Kind("peft linear drops", Mlp, _UP, 8),
    "saved": Kind("peft linear drops", Tied, _EMBEDDED, None),
    "dora": Kind("peft linear drops", Mlp, _UP | {"use_dora": True}, 8),
    "conv1d": Kind("peft linear drops", _transposed, _BOTH | {"fan_in_fan_out": True}, 32),
    "block": Kind("peft linear drops activates", _block, _ALL, 32),
    "experts": Kind("peft experts activates", _mixture, _STACKS, 32),
    "packed-experts": Kind("peft experts drops packed", lambda: _mixture("nf4"), _STACKS, 32),
}
if BITSANDBYTES:
    KINDS["quantized"] = Kind("peft linear drops packed", _over_nf4, _BOTH, 64)
