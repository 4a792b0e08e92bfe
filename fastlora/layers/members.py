"""A module of another library: its tensors, its activation, hooks on its calls; and its class.

It becomes another kind of module, and what it was again, by its class.
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
    """``getattr(module, name)``, sooner; a parametrized weight or FSDP's is no parameter there."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def why_not_tensor(tensor: Tensor | None, ndim: int, is_part: bool = False) -> str:
    """What is wrong with a weight (2 dimensions) or a bias (1), as "has dtype torch.int8"; or "".

    ``is_part``: it is FSDP's part between calls, which find it whole, and of torch's own class.
    None is as good as any.
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
    """Why this weight (of two dimensions) or bias (of one) isn't covered, if it is not; or ""."""
    reason, is_weight = why_not_tensor(tensor, len(shape)), len(shape) == 2
    if reason:
        return f"{of}{name} {reason}" if is_weight else f"{name} {reason}"
    if is_weight and tensor.is_meta:
        return f"{name} is on the meta device, without data"
    records = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if is_weight and records and tensor.is_inference():
        return f"{name} was made in inference mode"  # no backward can keep it
    if tensor.shape == shape:
        return ""
    return f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}"


# Packages of decorators whose functions compute the same as the function that they wrap: that of
# experts' implementations, torch.compile.
_SAME = ("transformers.integrations.moe", "torch._dynamo.")


def why_patched(kind: Any) -> str:
    """Why a class doesn't run the forward that its library defined, as text; "" if it does.

    Every class is asked whose forward the fast path doesn't call.  The function must come from the
    body of a class in ``__mro__``, so that a patch before ``import fastlora`` counts also.  A call
    that uses a cached record skips this, because it compares the functions themselves.
    """
    kind = getattr(kind, "plain_class", kind)
    # torch.compile guards a function that is compared, and compiles again when it is replaced.
    return "" if kind.forward is None else _why_patched(kind)


def _why_patched(kind: Any) -> str:
    if not _is_own(kind, kind.forward):
        return f"{kind.__name__}.forward was replaced on the class"
    if issubclass(kind, nn.Module) and not _is_own(nn.Module, kind.__call__):
        return f"{kind.__name__}.__call__ isn't torch.nn.Module's"
    return ""


# As torch.compiler.assume_constant_result does, which imports all of torch's compiler.
_why_patched._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _is_own(kind: type, function: Any) -> bool:
    """functools.wraps copies names, but neither globals nor code."""
    home = defined_in(function)
    if home.startswith(_SAME):
        return _is_own(kind, getattr(function, "__wrapped__", None))
    owner = getattr(function, "__qualname__", "").rpartition(".")[0]
    return any([base.__module__ == home and base.__qualname__ == owner for base in kind.__mro__])


def defined_in(function: Any) -> str:
    """The name of the module whose code a function is; "" for other callables."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module does something besides its library's forward."""
    attributes = module.__dict__  # a look-up here takes half the time of an attribute
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
    """Compile a call again when what :func:`is_hooked` sees of this module changes.

    Dynamo guards lengths and attributes, and neither the truth of a dict of hooks nor what a
    ``__dict__`` lacks.
    """
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        len(module.__dict__[hooks])
    _ = module.forward


def _acts_as_its_class(module: nn.Module) -> bool:
    """Whether the forward on this instance does what its class's does.

    It may be accelerate's, which moves inputs to the weight's device, where the fast path asks them
    to be; or the class's own, which accelerate leaves there when its hook is removed.
    """
    forward = module.__dict__["forward"]
    if getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module:
        return True
    hook: Any = module.__dict__.get("_hf_hook")
    return (
        is_class(type(hook), "accelerate.hooks", "AlignDevicesHook")
        and not hook.offload
        and not hook.io_same_device
    )


def activation_of(act: Any) -> str:
    """silu, gelu, gelu_tanh, relu or relu2; "" for any other, or if something acts on its calls."""
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
    # Their other forms are Python's.
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


def plain_class_of(module: nn.Module) -> Any:
    """What a module of ours is without what fastlora makes of it; the class of any other.

    FSDP2's class around it is left out.
    """
    kind = type(module)
    return getattr(kind, "plain_class", None) or under(kind)


def is_replaced(module: nn.Module, forwards: Iterable[Any]) -> bool:
    """Whether a forward on the instance, maybe inside of accelerate's, is none of these."""
    forward = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    return forward is not None and getattr(forward, "__func__", None) not in forwards


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
