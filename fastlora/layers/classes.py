"""A module becomes another kind of module, and what it was again, by its class."""

from functools import cache
from types import MethodType
from typing import Any

from torch import nn

from ..foreign import FULLY_SHARDED, derived_from

_FORWARDS = ("forward", "_old_forward")  # on an instance; the second is accelerate's


_made: dict[Any, Any] = {}  # by what they were made of


def class_over(mixin: Any, kind: Any, prefix: str = "LoRA") -> Any:
    """The class of modules that are ``mixin`` first, and else what ``plain_class``, ``kind``, is.

    It has the name of ``kind`` behind the prefix; without one it looks the same.  Copies and
    pickles of its modules name the two classes, since nobody can import this one.
    """
    key = mixin, kind, prefix
    if key not in _made:
        members = {"plain_class": kind, "__reduce_ex__": _reduce_ex, "_made_of": key}
        same = () if prefix else ("__module__", "__qualname__", "__doc__")
        members |= {name: getattr(kind, name) for name in same}
        _made.setdefault(key, type(prefix + kind.__name__, (mixin, kind), members))
    return _made[key]


def _reduce_ex(module: Any, protocol: Any) -> tuple:
    """As for any object, but that it is made anew by :func:`class_over`."""
    made: Any = module.plain_class.__reduce_ex__(module, protocol)
    return _blank, module._made_of, *made[2:]


def _blank(mixin: Any, kind: Any, prefix: str) -> Any:
    return object.__new__(class_over(mixin, kind, prefix))


def twin(module: nn.Module, kind: Any) -> Any:
    """A module of class ``kind`` with all that this one has, in dictionaries of its own."""
    other = object.__new__(kind)
    for name, value in vars(module).items():
        other.__dict__[name] = value.copy() if isinstance(value, dict) else value
    return other


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
