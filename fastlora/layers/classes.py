"""Changes the class of a module in place, and changes it back.

fastlora gives a module another forward by assigning its ``__class__``.  This keeps the module's
identity, parameters, names and hooks.  All packages change classes only by :func:`change_class`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

from torch import nn

from .guards import forget
from .module_parts import under

# The names of forwards in a module's __dict__.  accelerate's hook stores the original forward under
# the second name.
_FORWARDS = ("forward", "_old_forward")

_made: dict[Any, Any] = {}  # (mixin, kind, prefix) -> class


class Fast:
    """A mixin for classes that only speed a module up, and have no parameters of their own.

    :func:`own_classes` gives the classes that undo this.
    """

    plain_class: Any  # the module's class before it was sped up

    def train(self, mode: bool = True) -> Any:
        """torch's.  It returns at once if all parts are in this mode, as in each Trainer step."""
        module: Any = self
        return module if is_in_mode(module, mode) else super().train(mode)  # type: ignore[misc]


# Where methods ``train`` are defined that do nothing if no mode changes.
_TRAINS = (__name__, nn.Module.__module__, "transformers.modeling_utils")


def is_in_mode(module: nn.Module, mode: bool) -> bool:
    """Whether ``module.train(mode)`` would change nothing."""
    if module.training is not mode or type(module).train.__module__ not in _TRAINS:
        return False
    parts = module._modules.values()
    return all([part is None or is_in_mode(part, mode) for part in parts])


def class_over(mixin: Any, kind: Any, prefix: str = "LoRA") -> Any:
    """A subclass of ``mixin`` and ``kind``, in that order, whose ``plain_class`` is ``kind``.

    Its name is the prefix and the name of ``kind``.  With an empty prefix, it also has the module
    and docstring of ``kind``.  Copies and pickles of its objects store ``mixin`` and ``kind``,
    because a class that is made at run time can't be imported.
    """
    key = mixin, kind, prefix
    if key not in _made:
        members = {"plain_class": kind, "__reduce_ex__": _reduce_ex, "_made_of": key}
        copied = () if prefix else ("__module__", "__qualname__", "__doc__")
        members |= {name: getattr(kind, name) for name in copied}
        # setdefault: if another thread was faster, all modules get its class.
        _made.setdefault(key, type(prefix + kind.__name__, (mixin, kind), members))
    return _made[key]


def _reduce_ex(module: Any, protocol: Any) -> tuple:
    """The object's usual state, with :func:`class_over` as its constructor."""
    made: Any = module.plain_class.__reduce_ex__(module, protocol)
    # made: (constructor, its arguments, state, …)
    return _blank, module._made_of, *made[2:]


def _blank(mixin: Any, kind: Any, prefix: str) -> Any:
    """An object of the class, without state."""
    return object.__new__(class_over(mixin, kind, prefix))


def twin(module: nn.Module, kind: Any) -> Any:
    """A module of class ``kind`` with copies of this module's dicts, whose values are shared."""
    other = object.__new__(kind)
    for name, value in vars(module).items():
        other.__dict__[name] = value.copy() if isinstance(value, dict) else value
    return other


def change_class(module: Any, new: Any) -> Any:
    """Replace the module's class by ``new``.  Returns the replaced class; assigning it undoes this.

    If FSDP2 or a parametrization has derived a class from the module's class, that derived class is
    made again from ``new``.  Bound forwards of the replaced class in the module's ``__dict__`` are
    replaced also, and cached records are dropped.
    """
    kind: Any = type(module)
    old: Any = under(kind)
    if old.__name__ == f"Parametrized{old.__base__.__name__}":  # torch.nn.utils.parametrize's
        old = under(old.__base__)
    forget(module)
    object.__setattr__(module, "__class__", _over(kind, old, new))
    for name in _FORWARDS:
        forward = vars(module).get(name)
        if forward is not None and getattr(forward, "__func__", None) is old.forward:
            vars(module)[name] = MethodType(new.forward, module)
    return old


# Cached, so that modules of one class still have one class afterwards.
@cache
def _over(cls: Any, old: Any, new: Any) -> Any:
    """``new`` if ``cls`` is ``old``; else a copy of ``cls`` with the base ``new`` for ``old``."""
    if cls is old:
        return new
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    bases = [_over(base, old, new) if issubclass(base, old) else base for base in cls.__bases__]
    return type(cls.__name__, tuple(bases), members)


def change_classes(classes: Mapping[nn.Module, Any]) -> dict[nn.Module, Any]:
    """Give each module its class in this mapping.  Returns the replaced classes, to undo this."""
    return {module: change_class(module, kind) for module, kind in classes.items()}


@contextmanager
def changed_classes(classes: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside, each module has its class in this mapping."""
    replaced = change_classes(classes)
    try:
        yield
    finally:
        change_classes(replaced)


def own_classes(modules: Iterable[nn.Module], *kinds: Any) -> dict[nn.Module, Any]:
    """For each :class:`Fast` module (of these kinds, if any are given), the class it had before."""
    fast: Any = [module for module in modules if isinstance(module, kinds or Fast)]
    return {module: module.plain_class for module in fast}
