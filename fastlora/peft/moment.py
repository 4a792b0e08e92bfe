"""Whether this moment allows a fast call of any layer: no export, no transform, no global hook."""

from torch.nn.modules import module as nn_module

from ..layers import frozen
from . import versions

_never = versions.why_never()  # kept: a look-up in every call costs as much as a small op


def why_not_now() -> str:
    """Why no call is fast now, whatever the layer; "" if calls can be."""
    if _never or nn_module._has_any_global_hook():
        return _never or "a hook on all modules is registered"
    return frozen.why_not_here()
