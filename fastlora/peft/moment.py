"""Which way a call of PEFT's layers goes: what is asked at the moment of the call.

What the layer computes with is another question, :mod:`.reading`'s.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from ..backends import asked_backend
from ..backends.products import are_wide
from ..layers import frozen
from ..ops import way
from ..ops.autocast import autocast_is_on
from ..projection import is_plain
from . import versions

_never = versions.why_never()  # kept: a look-up in every call costs as much as a small op


def why_not_now() -> str:
    """Why no call is fast now, whatever the layer; "" if calls can be."""
    if _never or nn_module._has_any_global_hook():
        return _never or "a hook on all modules is registered"
    return frozen.why_not_here()


def adapters_now(layer: Any) -> list[str]:
    """The adapters that a call of this layer computes with, in PEFT's order.

    An empty list where it is the base layer's call: they are disabled, merged, or not active.
    """
    if layer.disable_adapters or layer.merged:
        return []
    own = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in own]


def is_peft_s_few(layer: Any, x: Any) -> bool:
    """Whether this is a call of few rows that drops: PEFT's own forward takes less time.

    Autograd isn't asked: reentrant checkpointing runs a call without it first, with the same mask.
    """
    if not layer.training or layer.lora_variant:
        return False
    drops = layer._modules["lora_dropout"]._modules.values()
    return any([type(drop) is not nn.Identity for drop in drops]) and is_few(
        layer, x, way.MOST_ROWS
    )


def is_few(layer: Any, x: Any, most_rows: int) -> bool:
    """Whether x has few rows, on a CPU and beside a plain weight that it multiplies fast.

    There PEFT's operations take less than a node does.  Compiled and under autocast they don't.
    """
    if torch.compiler.is_compiling() or not is_plain(x) or not x.is_cpu or x.is_nested:
        return False
    weight = layer._modules["base_layer"]._parameters.get("weight")
    if (
        not x.dim()
        or x.numel() > most_rows * x.shape[-1]
        or not is_plain(weight)
        or weight.dtype != x.dtype
    ):
        return False
    return not (are_wide(x) or autocast_is_on("cpu") or asked_backend() == "triton")
