"""Inspects a module of another library (tensors, activation, hooks), and changes its class.

fastlora speeds a module up by assigning its ``__class__``, and restores it the same way.  This
keeps the module's identity, parameters, names and hooks.
"""

from collections.abc import Iterable
from functools import cache, lru_cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..foreign import FULLY_SHARDED, derived_from, is_class, is_dtensor
from ..projection import DTYPES, is_plain

_FUNCTIONS = {functional.silu: "silu", functional.relu: "relu", torch.relu: "relu"}
_TRANSFORMERS = "transformers.activations"
_OF_TRANSFORMERS = {
    "SiLUActivation": "silu",
    "ReLUSquaredActivation": "relu2",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu",
}


def tensor_of(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, faster for parameters.

    A parametrized weight, or FSDP's while it is gathered, is an attribute but no parameter.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def why_not_tensor(tensor: Tensor | None, ndim: int, is_part: bool = False) -> str:
    """Why a weight (``ndim`` 2) or a bias (1) isn't supported: "has dtype torch.int8" …; or "".

    ``is_part``: it is FSDP's shard between calls, so its class and shape don't count.  A call sees
    the whole tensor.  None (no bias) is supported.
    """
    if tensor is None:
        return ""
    if not (is_plain(tensor) or is_part):
        hint = "sharded" if is_dtensor(tensor) else "quantized"
        return f"is of class {type(tensor).__name__} ({hint}?)"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}"
    if tensor.dim() != ndim and not is_part:
        return f"has shape {tuple(tensor.shape)} (sharded, and not gathered?)"
    return "" if tensor.dtype in DTYPES else f"has dtype {tensor.dtype}"


def why_not_part(
    name: str, tensor: Tensor, shape: tuple[int, ...], of: str = "the weight of "
) -> str:
    """Why a weight or bias with this expected shape isn't supported; "" if it is."""
    reason, is_weight = why_not_tensor(tensor, len(shape)), len(shape) == 2
    if reason:
        return f"{of}{name} {reason}" if is_weight else f"{name} {reason}"
    if is_weight and tensor.is_meta:
        return f"{name} is on the meta device, without data"
    records = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if is_weight and records and tensor.is_inference():
        return f"{name} was made in inference mode"  # it can't be saved for backward
    if tensor.shape == shape:
        return ""
    return f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}"


# Decorators in these packages wrap a forward without changing its results: transformers' decorator
# of experts, torch.compile.
_SAME = ("transformers.integrations.moe", "torch._dynamo.")


def why_patched(kind: Any) -> str:
    """Why a class doesn't run the forward that its library defined; "" if it does.

    The fast path replaces forwards, so it must not skip a patched one.  The check applies to each
    class whose forward it doesn't call.  The function must come from the body of a class in
    ``__mro__``, so that a patch made before ``import fastlora`` is found also.  Calls with a cached
    record skip this check, because their guard compares the functions themselves.
    """
    kind = getattr(kind, "plain_class", kind)
    # torch.compile guards a function that is compared, and recompiles when it is replaced.
    return "" if getattr(kind, "forward", None) is None else _why_patched(kind)


def _why_patched(kind: Any) -> str:
    if not _is_own(kind, kind.forward):
        return f"{kind.__name__}.forward was replaced on the class"
    if issubclass(kind, nn.Module) and not _is_own(nn.Module, kind.__call__):
        return f"{kind.__name__}.__call__ isn't torch.nn.Module's"
    return ""


# The effect of torch.compiler.assume_constant_result, without importing torch's compiler.
_why_patched._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _is_own(kind: type, function: Any) -> bool:
    """Whether the function comes from the body of the class or of a base class.

    Compares the module of the function's globals, because functools.wraps copies ``__module__``.
    """
    home = defined_in(function)
    if home.startswith(_SAME):
        return _is_own(kind, getattr(function, "__wrapped__", None))
    owner = getattr(function, "__qualname__", "").rpartition(".")[0]
    return any([base.__module__ == home and base.__qualname__ == owner for base in kind.__mro__])


def defined_in(function: Any) -> str:
    """The name of the module that defines a function; "" for other callables."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module does something besides its library's forward."""
    attributes = module.__dict__  # a look-up here takes half the time of getattr
    if torch.compiler.is_compiling():
        _guard(module)
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or ("forward" in attributes and not _acts_as_its_class(module))
        or why_patched(type(module))
    )


def _guard(module: nn.Module) -> None:
    """Make torch.compile recompile when the result of :func:`is_hooked` may change.

    Dynamo guards lengths and attributes.  It doesn't guard whether a dict of hooks is empty, or
    whether a name is missing in a ``__dict__``.
    """
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        len(module.__dict__[hooks])
    _ = module.forward


def _acts_as_its_class(module: nn.Module) -> bool:
    """Whether the forward in this module's ``__dict__`` computes the same as its class's.

    Three do.  accelerate's and ms-swift's move inputs to the weight's device, which the fast path
    requires anyway.  And when accelerate removes its hook, it leaves the class's own forward on the
    instance.
    """
    forward = module.__dict__["forward"]
    if "forward_origin" in module.__dict__:
        theirs: Any = getattr(forward, "__func__", None)
        if defined_in(theirs) == "swift.tuners.peft" and theirs.__name__ == "keep_device_forward":
            forward = module.__dict__["forward_origin"]  # the one that it calls
    if getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module:
        return True
    hook: Any = module.__dict__.get("_hf_hook")
    return (
        is_class(type(hook), "accelerate.hooks", "AlignDevicesHook")
        and not hook.offload
        and not hook.io_same_device
    )


def activation_of(act: Any) -> str:
    """silu, gelu, gelu_tanh, relu or relu2; "" for any other activation, or a hooked one."""
    if not isinstance(act, nn.Module):
        return _name_of_function(act)
    if is_hooked(act):
        return ""
    kind = type(act)
    if kind in (nn.SiLU, nn.ReLU):
        name = "silu" if kind is nn.SiLU else "relu"
        return "" if act.inplace else name
    if kind is nn.GELU:
        return _gelu(str(act.approximate))
    name = _OF_TRANSFORMERS.get(kind.__name__, "") if kind.__module__ == _TRANSFORMERS else ""
    # With other settings, transformers' GELU modules hold a Python method instead of torch's gelu.
    return _name_of_function(act.__dict__.get("act")) if name == "gelu" else name


def _name_of_function(function: Any) -> str:
    if function is functional.gelu:
        return "gelu"
    if type(function) is partial:
        known = function.func is functional.gelu and not function.args
        given = function.keywords
        return _gelu(given.get("approximate", "")) if known and len(given) == 1 else ""
    try:
        return _FUNCTIONS.get(function, "")
    except TypeError:  # it isn't hashable
        return ""


def _gelu(approximate: str) -> str:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate, "")


# A forward in a module's __dict__; accelerate stores the original one under the second name.
_FORWARDS = ("forward", "_old_forward")

_made: dict[Any, Any] = {}  # (mixin, kind, prefix) -> class


def class_over(mixin: Any, kind: Any, prefix: str = "LoRA") -> Any:
    """A subclass of ``mixin`` and ``kind``, in that order, whose ``plain_class`` is ``kind``.

    Its name is the prefix and the name of ``kind``.  Without a prefix it also has the module and
    docstring of ``kind``.  Copies and pickles of its modules store ``mixin`` and ``kind``, because
    a class that is made at run time can't be imported.
    """
    key = mixin, kind, prefix
    if key not in _made:
        members = {"plain_class": kind, "__reduce_ex__": _reduce_ex, "_made_of": key}
        same = () if prefix else ("__module__", "__qualname__", "__doc__")
        members |= {name: getattr(kind, name) for name in same}
        _made.setdefault(key, type(prefix + kind.__name__, (mixin, kind), members))
    return _made[key]


def _reduce_ex(module: Any, protocol: Any) -> tuple:
    """The object's usual state, with :func:`class_over` as its constructor."""
    made: Any = module.plain_class.__reduce_ex__(module, protocol)
    return _blank, module._made_of, *made[2:]


def _blank(mixin: Any, kind: Any, prefix: str) -> Any:
    return object.__new__(class_over(mixin, kind, prefix))


def twin(module: nn.Module, kind: Any) -> Any:
    """A module of class ``kind`` with copies of this module's dicts; all values are shared."""
    other = object.__new__(kind)
    for name, value in vars(module).items():
        other.__dict__[name] = value.copy() if isinstance(value, dict) else value
    return other


def plain_class_of(module: nn.Module) -> Any:
    """The module's class without the one that fastlora gave it, and without FSDP2's."""
    kind = type(module)
    return getattr(kind, "plain_class", None) or under(kind)


def is_replaced(module: nn.Module, forwards: Iterable[Any]) -> bool:
    """Whether the instance has a forward of its own that is none of these.

    If accelerate wrapped the forward, the wrapped one counts.
    """
    forward = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    return forward is not None and getattr(forward, "__func__", None) not in forwards


def change_class(layer: nn.Module, old: Any, new: Any) -> None:
    """Replace ``old`` by ``new`` in a layer of class ``old``, or of FSDP2's class over it.

    Bound forwards of the old class in the layer's ``__dict__`` are replaced also.
    """
    cls: Any = type(layer)
    layer.__class__ = new if cls is old else _over(cls, old, new)
    for name in _FORWARDS:
        if getattr(layer.__dict__.get(name), "__func__", None) is old.forward:
            layer.__dict__[name] = MethodType(new.forward, layer)


def is_over(cls: type, base: type) -> bool:
    """Whether ``cls`` is ``base``, or the class that FSDP2 derives from it."""
    if cls is base:
        return True
    *kinds, last = cls.__bases__
    return last is base and len(kinds) == 1 and bool(derived_from(kinds[0], *FULLY_SHARDED))


def under(cls: type) -> type:
    """The class from which FSDP2 derived this one, or itself."""
    *_, last = cls.__bases__
    return last if last is not object and is_over(cls, last) else cls


@cache
def _over(cls: type, old: type, new: type) -> type:
    """A copy of ``cls``, which FSDP2 or a parametrization derived from ``old``, over ``new``."""
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(new if b is old else b for b in cls.__bases__), members)
