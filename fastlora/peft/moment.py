"""Whether this moment allows a fast call of any layer: no export, no transform, no global hook."""

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from .versions import why_never

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
