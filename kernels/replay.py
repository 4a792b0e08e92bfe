"""Replays captured calls, and caches them by the kind of call.

The choice of tiles, grids, splits and buffers, and the binding of a kernel's arguments, cost the
host more time than a small layer takes on the device.  All of it depends only on shapes, strides,
dtypes, alignment and settings, which together are the *kind* of a call.  The first call of a kind
is captured (:mod:`.capture`), and every call of the kind is a replay.  Without replays, a call
takes 4.8 to 6.3 times as long on the host (``make bench ARGS=host``).
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import launch
from .capture import CapturedCall
from .common import INTERPRETED

calls: dict[Hashable, Any] = {}
_hooks = triton.knobs.runtime  # has the hooks of profilers


def replay_call(call: CapturedCall, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Run a captured call on tensors of its kind.  Each result is a new tensor, or None."""
    if INTERPRETED.value:  # no stream
        return call.replay(None, *tensors)
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    if call.device not in (None, device):  # Triton launches on the current device
        with torch.cuda.device(call.device):
            return replay_call(call, tensors)
    return call.replay(driver.get_current_stream(device), *tensors)


def is_observed() -> bool:
    """Whether an interceptor or a profiler's hook is set, which must see each launch.

    Replays bypass both, so calls run without a replay then.
    """
    # A hook is None, a function, or in newer versions of Triton a chain of functions, ``calls``.
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return launch.interceptor is not None or bool(hooks)


def is_in_graph_capture(device: torch.device) -> bool:
    """Whether a CUDA graph captures the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_of(tensors: Sequence[Tensor | None]) -> torch.device:
    """The device of the first tensor, which is the device of all of them."""
    for tensor in tensors:
        if tensor is not None:
            return tensor.device
    raise ValueError("a call has no tensor")


def facts_of(tensor: Tensor | None) -> Hashable:
    """A tensor's part of a cache key: its properties that launchers, Triton and ``covers`` read.

    The address modulo 16 is one of them, because Triton loads 16 bytes at once only from aligned
    addresses.  The device isn't, because all tensors of a call are on one device.
    """
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15, tensor.is_neg()
