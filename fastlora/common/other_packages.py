"""Recognize classes of libraries that fastlora doesn't import by their names, functions by code.

Checks here don't read ``sys.modules``: torch.compile would guard on the number of modules, and
recompile after every import.
"""

from functools import lru_cache
from importlib import import_module
from inspect import CO_VARARGS, CO_VARKEYWORDS
from typing import Any

import torch

# FSDP2 changes a module's class to a subclass of the first.  FSDP and DDP wrap the module.
FULLY_SHARDED = ("torch.distributed.fsdp", "FSDPModule")
FSDP = ("torch.distributed.fsdp", "FullyShardedDataParallel")
DDP = ("torch.nn.parallel", "DistributedDataParallel")
PLAIN = (torch.Tensor, torch.nn.Parameter)  # no subclasses


def derived_from(kind: type, package: str, name: str) -> type | None:
    """The class of this name and package among ``kind`` and its bases, or None."""
    return next((base for base in kind.__mro__ if is_class(base, package, name)), None)


def is_class(kind: type, package: str, name: str) -> bool:
    """Whether ``kind`` has this name and is defined in this package or one of its modules."""
    return kind.__name__ == name and f"{kind.__module__}.".startswith(f"{package}.")


@lru_cache(maxsize=256)
def is_same_code(function: Any, known: Any) -> bool:
    """Whether a function has the same bytecode as a known function.

    It recognizes a subclass that overrides ``forward`` with an unchanged copy.
    """
    code = getattr(function, "__code__", None)
    return code is not None and _what_it_does(code) == _what_it_does(known.__code__)


def _what_it_does(code: Any) -> tuple[Any, ...]:
    constants = [c for c in code.co_consts if c is not None and not isinstance(c, str)]
    takes = code.co_argcount, code.co_kwonlyargcount, code.co_flags & (CO_VARARGS | CO_VARKEYWORDS)
    return code.co_code, code.co_names, constants, takes


def optional(name: str, need: str, extra: str) -> Any:
    """Import a module.  Raises ImportError with this need, and the extra that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{need}: pip install 'fastlora-kernels[{extra}]'") from error


def is_dtensor(tensor: object) -> bool:
    """Whether it is a torch DTensor, which is sharded over ranks."""
    return is_class(type(tensor), "torch.distributed.tensor", "DTensor")


def defined_in(function: Any) -> str:
    """The name of the module that defines a function; "" for other callables."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def acts_as_its_class(module: torch.nn.Module) -> bool:
    """Whether the forward in this module's ``__dict__`` computes the same as its class's.

    True for three forwards:

    * accelerate's and ms-swift's, which only move inputs to the weight's device.  (The fast path
      requires inputs on that device.)
    * the class's own forward, bound to this module.  accelerate leaves it in ``__dict__`` when it
      removes its hook.
    """
    forward = module.__dict__["forward"]
    if "forward_origin" in module.__dict__:
        method: Any = getattr(forward, "__func__", None)
        if defined_in(method) == "swift.tuners.peft" and method.__name__ == "keep_device_forward":
            forward = module.__dict__["forward_origin"]  # the forward that it calls
    if getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module:
        return True
    hook: Any = module.__dict__.get("_hf_hook")
    return (
        is_class(type(hook), "accelerate.hooks", "AlignDevicesHook")
        and not hook.offload
        and not hook.io_same_device
    )
