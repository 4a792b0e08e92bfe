"""The choice of backend: argument, context manager, ``FASTLORA_BACKEND``, the device's default.

A backend is a module with ``forward``, ``backward`` and ``dropout_mask`` of the same meaning
(``torch`` is the one to read).  Registering one here is all that the layers above need.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from . import torch as torch_backend

_BACKENDS: dict[str, ModuleType] = {"torch": torch_backend}
_CHOSEN: ContextVar[str | None] = ContextVar("fastlora_backend", default=None)
# Read once: a look-up costs as much as a small op.
_ENVIRONMENT = os.environ.get("FASTLORA_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the LoRA ops inside the block on this backend: ``with fastlora.use_backend("torch"): …``.

    ``FASTLORA_BACKEND`` does the same for a process.  An unknown name is a ValueError that lists
    what there is.
    """
    _check_name(name, "use_backend")
    token = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def backend_name(argument: str | None = None) -> str:
    """The name of the backend that a call made now would run on."""
    if argument is not None:
        return _check_name(argument, "backend")
    chosen = _CHOSEN.get()
    if chosen is not None:
        return chosen
    return _check_name(_ENVIRONMENT, "FASTLORA_BACKEND") if _ENVIRONMENT else "torch"


def find_backend(name: str | None = None) -> ModuleType:
    """The module behind :func:`backend_name`."""
    return _BACKENDS[backend_name(name)]


def _check_name(name: str, source: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(
            f"{source} asks for the backend {name!r}, but there is only "
            + ", ".join(map(repr, _BACKENDS))
        )
    return name
