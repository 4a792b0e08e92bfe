"""Inspects a module of any library: its tensors, activation, hooks and class."""

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..call.projection import DTYPES, is_plain
from ..common.other_packages import (
    FULLY_SHARDED,
    acts_as_its_class,
    defined_in,
    derived_from,
    is_dtensor,
)

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

    A parametrized weight, and FSDP's weight during a call, are attributes but not in
    ``_parameters``.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def why_not_tensor(tensor: Tensor | None, ndim: int, is_part: bool = False) -> str:
    """Why a weight (``ndim`` 2) or a bias (1) isn't supported: "has dtype torch.int8" …; or "".

    ``is_part``: the tensor is FSDP's shard, which a module has between calls.  A call gets the
    whole tensor, so the class and shape of the shard aren't checked.  None (no bias) is supported.
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
    """Why this weight or bias isn't supported; "" if it is.  ``shape`` is the expected shape."""
    reason, is_weight = why_not_tensor(tensor, len(shape)), len(shape) == 2
    if reason:
        return f"{of}{name} {reason}" if is_weight else f"{name} {reason}"
    if is_weight and tensor.is_meta:
        return f"{name} is on the meta device, without data"
    records = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if is_weight and records and tensor.is_inference():
        return f"{name} was made in inference mode"  # autograd can't save it for backward
    if tensor.shape == shape:
        return ""
    return f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}"


# Decorators in these packages wrap a forward without changing its results: transformers' decorator
# of experts, torch.compile.
_SAME = ("transformers.integrations.moe", "torch._dynamo.")


def why_patched(kind: Any) -> str:
    """Why a class doesn't run the forward that its library defined; "" if it does.

    The fast path runs in place of a class's forward, so it must not replace a patched forward.  A
    forward is unpatched if it was defined in the body of a class in ``__mro__``.  This also finds
    patches made before ``import fastlora``.  Calls with a cached record skip the check, because
    their guard compares the functions themselves.
    """
    kind = getattr(kind, "plain_class", kind)
    # The comparison makes torch.compile guard ``forward``, so that it recompiles after a patch.
    return "" if getattr(kind, "forward", None) is None else _why_patched(kind)


def _why_patched(kind: Any) -> str:
    if not _is_own(kind, kind.forward):
        return f"{kind.__name__}.forward was replaced on the class"
    if issubclass(kind, nn.Module) and not _is_own(nn.Module, kind.__call__):
        return f"{kind.__name__}.__call__ isn't torch.nn.Module's"
    return ""


# Same as the decorator torch.compiler.assume_constant_result, without importing the compiler.
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
        or ("forward" in attributes and not acts_as_its_class(module))
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
        # Only partial(gelu, approximate=…) is known.
        is_gelu = function.func is functional.gelu and not function.args
        keywords = function.keywords
        return _gelu(keywords.get("approximate", "")) if is_gelu and len(keywords) == 1 else ""
    try:
        return _FUNCTIONS.get(function, "")
    except TypeError:  # it isn't hashable
        return ""


def _gelu(approximate: str) -> str:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate, "")


def plain_class_of(module: nn.Module) -> Any:
    """The module's original class, from which fastlora's or FSDP2's class was derived."""
    kind = type(module)
    return getattr(kind, "plain_class", None) or under(kind)


def is_replaced(module: nn.Module, forwards: Iterable[Any]) -> bool:
    """Whether ``__dict__`` has a forward that isn't a method of one of these functions.

    If accelerate wrapped the forward, the forward under the wrapper is tested.
    """
    forward = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    return forward is not None and getattr(forward, "__func__", None) not in forwards


def under(cls: type) -> type:
    """The class from which FSDP2 derived this one, or itself."""
    # FSDP2's class has the bases FSDPModule and the module's own class.
    first, *bases = cls.__bases__
    return bases[0] if len(bases) == 1 and derived_from(first, *FULLY_SHARDED) else cls
