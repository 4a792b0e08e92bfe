"""What no layer knows of itself: whether this moment, and this input, allow a fast call."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from ...ops import is_plain
from ...ops.autocast import AUTOCAST_DTYPES
from .. import is_disabled

_DISABLED = is_disabled()  # read once: a look-up in every call costs as much as a small op


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


def why_not_input(x: Tensor, weight: Tensor) -> str:
    """Why a call with this x and this base weight [out, in] is PEFT's; "" if it can be fast."""
    if not isinstance(x, Tensor) or not is_plain(x) or x.layout is not torch.strided:
        return "its input is no plain dense tensor"
    if x.device != weight.device:
        return f"its input is on {x.device}, its weight on {weight.device}"
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return "its input doesn't fit the weight"
    if x.dtype != weight.dtype and not (
        x.dtype in AUTOCAST_DTYPES
        and weight.dtype in AUTOCAST_DTYPES
        and torch.is_autocast_enabled(x.device.type)
    ):
        return f"its input is {x.dtype}, its weight {weight.dtype}"
    return ""
