"""Whether this moment allows a fast call of any layer: no export, no transform, no global hook."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.modules import module as nn_module

from .. import frozen
from . import versions

# Kept: a look-up in every call costs as much as a small op.
_never, _never_dora = versions.why_never(), versions.why_not_dora()


def why_not_now() -> str:
    """Why no call is fast now, whatever the layer; "" if calls can be."""
    return _never or why_not_here()


def why_not_here() -> str:
    """The same, but for the version of PEFT and the environment."""
    if nn_module._has_any_global_hook():
        return "a hook on all modules is registered"
    return frozen.why_not_here()


def why_not_dora() -> str:
    """Why DoRA's calls stay PEFT's where others can be fast; "" if they needn't."""
    return _never_dora


@contextmanager
def on_trial() -> Iterator[None]:
    """Inside, calls are fast whatever the version of PEFT; afterwards it is asked anew."""
    global _never, _never_dora
    _never = _never_dora = ""
    try:
        yield
    finally:
        _never, _never_dora = versions.why_never(), versions.why_not_dora()
