"""Classes of what fastlora doesn't import, known by their names; and functions, by what they do.

``sys.modules`` isn't asked: torch.compile would guard the number of its modules, and compile again
after any import.
"""

from functools import lru_cache
from inspect import CO_VARARGS, CO_VARKEYWORDS
from typing import Any

import torch

# What FSDP2 and FSDP derive classes from.
FULLY_SHARDED = ("torch.distributed.fsdp", "FSDPModule")
FSDP = ("torch.distributed.fsdp", "FullyShardedDataParallel")
DDP = ("torch.nn.parallel", "DistributedDataParallel")
PLAIN = (torch.Tensor, torch.nn.Parameter)  # torch's own


def derived_from(kind: type, package: str, name: str) -> type | None:
    """The class of this name in this package that ``kind`` is or inherits from; None: none is."""
    return next((base for base in kind.__mro__ if is_class(base, package, name)), None)


def is_class(kind: type, package: str, name: str) -> bool:
    """Whether ``kind`` is the class of this name in this package, or in a module inside of it."""
    return kind.__name__ == name and f"{kind.__module__}.".startswith(f"{package}.")


@lru_cache(maxsize=256)
def is_same_code(function: Any, known: Any) -> bool:
    """Whether it does what a known function does, compared instruction by instruction."""
    code = getattr(function, "__code__", None)
    return code is not None and _what_it_does(code) == _what_it_does(known.__code__)


def _what_it_does(code: Any) -> tuple[Any, ...]:
    constants = [c for c in code.co_consts if c is not None and not isinstance(c, str)]
    takes = code.co_argcount, code.co_kwonlyargcount, code.co_flags & (CO_VARARGS | CO_VARKEYWORDS)
    return code.co_code, code.co_names, constants, takes


def is_dtensor(tensor: object) -> bool:
    """Whether it is torch's DTensor, of which each rank has a part."""
    return is_class(type(tensor), "torch.distributed.tensor", "DTensor")
