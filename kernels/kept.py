"""A call, resolved once and replayed: the torch operations and the launches that it comes to.

To choose tiles, grids, splits and buffers, and to bind a kernel's arguments, costs the host more
than a small layer costs the device.  All of that depends on shapes, strides, dtypes, alignment and
settings alone: these are the kind of a call.  The first call of a kind is written down as a script
(:mod:`.script`); it and all later ones are replays of that.
"""

from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

from . import plan, target
from .common import INTERPRETED
from .launch import is_intercepted
from .script import Script, script_of

_MOST = 1024  # calls that are kept; some 15 kB each, a group of three twice that
_calls: dict[Hashable, Script] = {}
_changes = Lock()  # to find the oldest, no other thread may change them


def replayed(
    function: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    settings: tuple[Hashable, ...],
    covers: Callable[[], bool],
    calls: dict | None = None,
) -> list[Tensor | None] | None:
    """What ``function(tensors, *settings)`` returns, a list of tensors it made, and of None.

    The function may use torch's operations and this package's launchers.  What it does may depend
    on the settings, and on everything of the tensors but their elements.  They are on one device,
    which is the current one.  None if a call of a new kind isn't one that it ``covers``.  Raises
    RuntimeError for a new kind inside of a CUDA graph's capture.

    ``calls``: where to keep this one instead of here, for a caller that comes with it only if the
    tensors agree with those of its calls before in all but their elements: they aren't compared.
    """
    if is_intercepted() or _is_watched():
        return list(function(tensors, *settings)) if covers() else None
    key: Hashable = (function, settings, plan.forced(), target.forced())
    if calls is None:
        here = next(tensor for tensor in tensors if tensor is not None).device
        key, calls = (key, here, *map(_facts, tensors)), _calls
    kept = calls.get(key)
    if kept is None:
        if not covers():
            return None
        if _is_captured(tensors):
            raise RuntimeError(
                "a CUDA graph is being captured, and no call of this kind has run before: kernels "
                "are compiled and loaded outside of a capture. Run the same step once before it"
            )
        kept = script_of(function, tensors, settings)
        with _changes:
            while len(calls) >= _MOST:
                del calls[next(iter(calls))]  # the oldest
            calls[key] = kept
    return kept.replay(_stream(), *tensors)


def _facts(tensor: Tensor | None) -> Hashable:
    """What launchers and Triton look at, and ``covers``; all tensors are on one device.

    From aligned addresses, 16 bytes are loaded at once.
    """
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15, tensor.is_neg()


def _is_captured(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a CUDA graph records what the current stream is given."""
    on_gpu = any(tensor is not None and tensor.is_cuda for tensor in tensors)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _is_watched() -> bool:
    """Whether a profiler wants to hear of launches; Triton tells it in ordinary ones."""
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _stream() -> Any:
    """What Triton launches on now."""
    if INTERPRETED.value:
        return None
    active = triton.runtime.driver.active
    return active.get_current_stream(active.get_current_device())
