"""The choice of backend: argument, context manager, ``FASTLORA_BACKEND``, the device's default.

The first of these four that names a backend decides.  The default is ``triton`` on the GPUs that
its kernels support, and ``torch`` elsewhere.  A backend is a module with the interface of
:mod:`.protocol`; its name in ``BACKENDS`` is all that the layers above need.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import torch as pytorch  # here `torch` is the backend

from ..call.projection import Output
from ..common.text import shown
from .protocol import Backend as Backend
from .protocol import BackwardCall as BackwardCall
from .protocol import Call as Call
from .protocol import GatedProduct as GatedProduct

if TYPE_CHECKING:  # the type checker compares every backend with the interface
    from . import torch as _torch
    from . import triton as _triton

    _HELD: tuple[Backend, ...] = (_torch, _triton)

BACKENDS = ("torch", "triton")
_CHOSEN: ContextVar[str | None] = ContextVar("fastlora_backend", default=None)
# Read once, because reading the environment takes as long as a small op.
_ENVIRONMENT = os.environ.get("FASTLORA_BACKEND")
_CPU = pytorch.device("cpu")


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run the LoRA ops inside the block on this backend: ``with fastlora.use_backend("torch"): …``.

    ``FASTLORA_BACKEND`` does the same for a process.  A backward runs on the backend of its
    forward.  Under ``torch.compile`` it runs on the backend that is chosen in the thread of the
    backward, with the same numbers.  Raises ValueError for an unknown name, and for a backend whose
    package isn't installed.
    """
    return _chosen(_check_name(name, "use_backend"))


@contextmanager
def _chosen(name: str) -> Iterator[None]:
    token = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def backend_name(argument: str | None = None, device: pytorch.device = _CPU) -> str:
    """The name of the backend for a call with tensors on this device, if it were made now."""
    if argument is not None:
        return _check_name(argument, "backend")
    chosen = _CHOSEN.get()
    if chosen is not None:
        return chosen
    if _ENVIRONMENT:
        return _check_name(_ENVIRONMENT, "FASTLORA_BACKEND")
    return "torch" if device.type != "cuda" else _gpu_default(device)


def asked_backend(argument: str | None = None) -> str | None:
    """The backend that an argument, a context manager or the environment asks for, or None."""
    return argument if argument is not None else _CHOSEN.get() or _ENVIRONMENT


def find_backend(name: str | None = None, device: pytorch.device = _CPU) -> Backend:
    """The module that :func:`backend_name` names.  The first call imports it."""
    return _module(backend_name(name, device))


def planned_backend(outputs: Sequence[Output]) -> tuple[str, str]:
    """The backend that runs a call with these outputs, and the reason if another one was chosen.

    x has the dtype of the first weight.
    """
    weight = outputs[0].base.weight
    name, reasons = backend_name(device=weight.device), [""]
    # Ends at the torch backend at the latest, which covers every call.
    while reason := _module(name).why_not(weight.dtype, weight.device, outputs):
        name = _module(name).HANDS_TO
        reasons.append(reason)
    return name, reasons[-1]


@cache
def _module(name: str) -> Backend:
    return cast(Backend, import_module(f".{name}", __name__))


@cache
def _gpu_default(device: pytorch.device) -> str:
    if not _has_triton():
        return "torch"
    return "torch" if _module("triton").why_not(pytorch.float16, device, ()) else "triton"


@cache
def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] is None, which hides the package
        return False


def _check_name(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(
            f"{source} asks for the backend {shown(name)}, but there is only "
            + ", ".join(map(repr, BACKENDS))
        )
    if name == "triton" and not _has_triton():
        raise ValueError(
            f"{source} asks for the backend 'triton', but the package triton isn't installed"
        )
    return name
