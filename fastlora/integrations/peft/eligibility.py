"""Which calls of a PEFT LoRA layer run fast.  Every other one is PEFT's own, untouched.

The fast path reads the tensors of ``base_layer``, ``lora_A`` and ``lora_B`` and doesn't call these
modules.  So whatever acts on such a call (a hook, another class, a replaced forward) sends the
layer to PEFT's forward, which does call them.

All of this is asked anew in every call: adapters come and go, and so do hooks.
"""

import sys
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as nn_module

from ...ops import is_plain
from ...projection import DTYPES
from .. import is_disabled
from .masks import DROPOUTS

_DISABLED = is_disabled()  # read once: a look-up in every call costs as much as a small op
_LINEAR_FORWARD = nn.Linear.forward
_ALIGN_DEVICES = "AlignDevicesHook"


def active_adapters(layer: PeftLinear) -> list[str]:
    """The active adapters that this layer has, in PEFT's order."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def runs_base_alone(layer: PeftLinear) -> bool:
    """Whether a call is the base layer's and nothing more: disabled, merged, or nothing active."""
    return layer.disable_adapters or layer.merged or not active_adapters(layer)


def why_not_layer(layer: PeftLinear) -> str:
    """Why a call of this layer as it is now, adapters on, is PEFT's; "" if it can be fast."""
    if not layer.cast_input_dtype_enabled:
        return "PEFT's casting of inputs is switched off (disable_input_dtype_casting)"
    names = active_adapters(layer)
    variants, magnitudes = layer.lora_variant, layer.lora_magnitude_vector
    weight = base_weight(layer)
    reason = _why_not_base(layer.base_layer, weight)
    rates = set()
    for name in names:
        if reason:
            return reason
        dropout = layer.lora_dropout[name]
        reason = (
            _why_not_linear(layer.lora_A[name], "lora_A", weight)
            or _why_not_linear(layer.lora_B[name], "lora_B", weight)
            or _why_not_dropout(dropout)
        )
        rates.add(rate(dropout))
        variant = variants.get(name)
        if variant is not None and not reason:
            if type(variant) is not DoraLinearVariant:
                reason = f"its adapter {name} is of a kind of its own ({_name_of(variant)})"
            elif len(names) > 1:
                reason = "DoRA beside another active adapter"
            elif layer.lora_B[name].bias is not None:
                reason = "DoRA with lora_bias"
            elif type(magnitudes[name]) is not DoraLinearLayer or is_hooked(magnitudes[name]):
                reason = "something watches or replaces its DoRA magnitude"
            elif magnitudes[name].weight.device != weight.device:
                reason = "its DoRA magnitude is on another device"
    if not reason and len(rates) > 1:
        return "its active adapters have different dropouts, and are training"
    return reason


def why_not_input(x: Tensor, weight: Tensor) -> str:
    """Why a call with this x and this base weight [out, in] is PEFT's; "" if it can be fast."""
    if not isinstance(x, Tensor) or not is_plain(x) or x.layout is not torch.strided:
        return "its input is no plain dense tensor"
    if x.device != weight.device:
        return f"its input is on {x.device}, its weight on {weight.device}"
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return "its input doesn't fit the weight"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"its input is {x.dtype}, its weight {weight.dtype}"
    return ""


def why_not_now() -> str:
    """Why no call is fast now, whatever the layer; "" if calls can be."""
    if _DISABLED:
        return "FASTLORA_DISABLE is set"
    if torch.compiler.is_compiling():
        # An exported program should need PyTorch alone.
        return "the model is being exported" if torch.compiler.is_exporting() else ""
    if torch.jit.is_tracing():
        return "the model is being traced"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if nn_module._has_any_global_hook():
        return "a hook on all modules is registered"
    return ""


def base_weight(layer: PeftLinear) -> Tensor:
    """The base's weight as [out, in]."""
    weight = layer.base_layer.weight
    return weight.T if is_conv1d(layer.base_layer) and weight.dim() == 2 else weight


def is_conv1d(base: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [in, out]."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and type(base) is pytorch_utils.Conv1D


def rate(dropout: nn.Module) -> float:
    """The probability with which this module drops now: 0 in evaluation."""
    return float(dropout.p) if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def is_hooked(module: nn.Module) -> bool:
    """Whether something acts on a call of this module besides its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not _only_aligns_devices(module))
    )


def _only_aligns_devices(module: nn.Module) -> bool:
    """Whether its replaced forward is accelerate's, which moves inputs to the weight's device.

    :func:`why_not_input` asks that they be there.
    """
    hook: Any = module.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == _ALIGN_DEVICES
        and type(hook).__module__ == "accelerate.hooks"
        and not hook.offload
        and not hook.io_same_device
    )


def _why_not_base(base: nn.Module, weight: Tensor) -> str:
    if type(base).forward is not _LINEAR_FORWARD and not is_conv1d(base):
        return f"its base is a {type(base).__name__}, no torch.nn.Linear"
    return _why_not_module(base, "its base layer", weight) or _why_not_bias(base)


def _why_not_bias(base: nn.Module) -> str:
    bias: Any = base.bias
    if bias is None or (is_plain(bias) and bias.dtype in DTYPES):
        return ""
    return f"its base's bias is a {type(bias).__name__} of {bias.dtype}"


def _why_not_linear(linear: nn.Module, name: str, base: Tensor) -> str:
    if type(linear) is not nn.Linear:
        return f"its {name} is a {type(linear).__name__}, no torch.nn.Linear"
    weight = linear.weight
    if weight.device != base.device:
        return f"its {name} is on {weight.device}, its base on {base.device}"
    return _why_not_module(linear, f"its {name}", weight)


def _why_not_module(module: nn.Module, name: str, weight: Tensor) -> str:
    if is_hooked(module):
        if hasattr(weight, "ds_id"):
            return f"DeepSpeed ZeRO-3 gathers {name} when it is called"
        return f"something watches or replaces a call of {name} (a hook)"
    if not is_plain(weight):
        if isinstance(weight, DTensor):
            return f"{name} is sharded (DTensor)"
        return f"the weight of {name} is a {type(weight).__name__}"
    if weight.device.type == "meta":
        return f"{name} is on the meta device, without data"
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        return f"the weight of {name} is {weight.dtype} of shape {tuple(weight.shape)}"
    return ""


def _why_not_dropout(dropout: nn.Module) -> str:
    if type(dropout) not in DROPOUTS or is_hooked(dropout):
        return f"its dropout is a {type(dropout).__name__}, or is watched by a hook"
    if rate(dropout) >= 1.0:
        return "its dropout drops everything"
    return ""


def _name_of(variant: object) -> str:
    name = variant.__name__ if isinstance(variant, type) else type(variant).__name__
    return name.removesuffix("LinearVariant")
