"""A layer becomes another kind of layer, and what it was again, by its class."""

from functools import cache
from types import MethodType
from typing import Any

from torch import nn

from ..foreign import FULLY_SHARDED, derived_from

_FORWARDS = ("forward", "_old_forward")  # on an instance; the second is accelerate's


def change_class(layer: nn.Module, old: Any, new: Any) -> None:
    """Give a layer of class ``old``, or of one derived from it, ``new`` in its place."""
    cls: Any = type(layer)
    layer.__class__ = new if cls is old else _over(cls, old, new)
    for name in _FORWARDS:
        if getattr(layer.__dict__.get(name), "__func__", None) is old.forward:
            layer.__dict__[name] = MethodType(new.forward, layer)


def is_over(cls: type, base: type) -> bool:
    """Whether ``cls`` is ``base``, or what FSDP2 makes of that."""
    if cls is base:
        return True
    *kinds, last = cls.__bases__
    return last is base and len(kinds) == 1 and bool(derived_from(kinds[0], *FULLY_SHARDED))


def under(cls: type) -> type:
    """The class that FSDP2 made this one of, or itself."""
    *_, last = cls.__bases__
    return last if last is not object and is_over(cls, last) else cls


@cache
def _over(cls: type, old: type, new: type) -> type:
    """``cls``, which FSDP2 or a parametrization derived from ``old``, over ``new``."""
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(new if b is old else b for b in cls.__bases__), members)
