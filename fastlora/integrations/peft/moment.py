"""What no layer knows of itself: whether this moment, and this input, allow a fast call."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from ...ops import is_plain
from ...ops.autocast import AUTOCAST_DTYPES
from . import why_never

_NEVER = why_never()  # asked once: a look-up in every call costs as much as a small op


def why_not_now() -> str:
    """Why no call is fast now, whatever the layer; "" if calls can be."""
    if _NEVER:
        return _NEVER
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():  # the program should need PyTorch alone
            return "the model is being exported"
    elif torch.jit.is_tracing():
        return "the model is being traced"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if nn_module._has_any_global_hook():
        return "a hook on all modules is registered"
    return ""


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the fast path takes this x beside this base weight [out, in].

    What it doesn't take, PEFT may convert or refuse.
    """
    if not is_plain(x) or x.layout is not torch.strided or x.device != weight.device:
        return False
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    return x.dtype == weight.dtype or (
        x.dtype in AUTOCAST_DTYPES
        and weight.dtype in AUTOCAST_DTYPES
        and torch.is_autocast_enabled(x.device.type)
    )
