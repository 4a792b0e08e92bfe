"""A call, resolved once and replayed: the torch operations and the launches that it comes to.

To choose tiles, grids, splits and buffers, and to bind a kernel's arguments, costs the host more
than a small layer costs the device.  All of that depends on shapes, strides, dtypes, alignment and
settings alone: these are the kind of a call.  The first call of a kind is recorded as a script
(:mod:`.script`); it and all later ones are replays of that.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import launch, plan, target
from .common import INTERPRETED
from .script import Script, script_of


class Unproven(Exception):  # noqa: N818  # nobody sees it
    """Nobody has judged the kernels of a call on this device yet, or they were found wrong."""

    def __init__(self, refused: bool) -> None:
        super().__init__("a call's kernels are on trial")
        self.refused = refused


class Resolved(NamedTuple):
    """A script, and where it is kept if its kernels are believed; None: it wasn't to be had."""

    calls: dict
    key: Hashable
    script: Script | None


# Whether kernels of these identities are believed on a device; None: they aren't known there.
Judge = Callable[[Iterable[str], torch.device], bool | None]
_judge: Judge | None = None
_here = threading.local()  # a trial is one thread's

_MOST = 1024  # calls that are kept; some 15 kB each, a group of three 24
_calls: dict[Hashable, Script] = {}
_changes = threading.Lock()  # to find the oldest, no other thread may change them


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
    which is the current one meanwhile.  None if a call of a new kind isn't one that it ``covers``.
    Raises RuntimeError for a new kind inside of a CUDA graph's capture, and :class:`Unproven` for
    kernels that a judge doesn't believe.

    ``calls``: where to keep this one instead of here, for a caller that comes with it only if the
    tensors agree with those of its calls before in all but their elements: they aren't compared.
    """
    key: Hashable = (function, settings, plan.forced, plan.edition, target.forced)
    if calls is None:
        key, calls = (key, _device_of(tensors), *map(_facts, tensors)), _calls
    script = calls.get(key)
    if script is None or launch.interceptor is not None or _is_watched():
        device = _device_of(tensors)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            is_believed = _believes_all(device) if script is None else script is not _REFUSED
            if launch.interceptor is not None or (is_believed and _is_watched()):
                return list(function(tensors, *settings)) if covers() else None
            if script is None:
                if not covers():
                    return None
                script = _resolved(function, tensors, settings, device, Resolved(calls, key, None))
    return _replay(script, tensors)


def _replay(script: Script, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    if INTERPRETED.value:
        return script.replay(None, *tensors)
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    if script.device not in (None, device):  # Triton launches on the current one
        with torch.cuda.device(script.device):
            return _replay(script, tensors)
    return script.replay(driver.get_current_stream(device), *tensors)


def _resolved(
    function: Callable, tensors: Sequence, settings: tuple, device: torch.device, resolved: Resolved
) -> Script:
    """The script of a call of a new kind, kept if its kernels are believed.

    On trial, where it is noted.  Raises :class:`Unproven` for one that has to be.
    """
    if _is_captured(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and no call of this kind has run before: kernels "
            "are compiled and loaded outside of a capture. Run the same step once before it"
        )
    trial, place = getattr(_here, "trial", None), (id(resolved.calls), resolved.key)
    if trial is not None:
        if place not in trial:
            trial[place] = resolved  # for the case that there is none
            trial[place] = resolved._replace(script=script_of(function, tensors, settings))
        return trial[place].script
    try:
        script = script_of(function, tensors, settings)
    except Exception:
        if _believes_all(device):
            raise
        raise Unproven(refused=False) from None  # the trial says what it is
    believed = _judge is None or _judge(script.identities, device)
    if believed is None:
        raise Unproven(refused=False)
    keep(resolved._replace(script=script if believed else None))
    return script if believed else _REFUSED


def _believes_all(device: torch.device) -> bool:
    """Whether nobody judges there."""
    return _judge is None or bool(_judge((), device))


def keep(resolved: Resolved) -> None:
    """Calls of this kind are replays of this script from now on; without one they are refused."""
    calls = resolved.calls
    with _changes:
        while len(calls) >= _MOST:
            del calls[next(iter(calls))]  # the oldest
        calls[resolved.key] = resolved.script or _REFUSED


def _refuse(*_: object) -> list:
    raise Unproven(refused=True)


_REFUSED = Script(_refuse, "", [], frozenset())


def use_judge(judge: Judge | None) -> None:
    """Ask this one, from now on, of the kernels of every new kind of call."""
    global _judge
    _judge = judge


@contextmanager
def on_trial() -> Iterator[dict[Hashable, Resolved]]:
    """In this thread and block, kernels run that nobody believes yet; new kinds are noted."""
    _here.trial = {}
    try:
        yield _here.trial
    finally:
        _here.trial = None


def _facts(tensor: Tensor | None) -> Hashable:
    """What launchers and Triton look at, and ``covers``; all tensors are on one device.

    From aligned addresses, 16 bytes are loaded at once.
    """
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15, tensor.is_neg()


def _is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph records what the current stream is given."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _device_of(tensors: Sequence[Tensor | None]) -> torch.device:
    return next(tensor for tensor in tensors if tensor is not None).device


def _is_watched() -> bool:
    """Whether a profiler wants to hear of launches; Triton tells it in ordinary ones."""
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
