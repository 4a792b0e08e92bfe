"""PackedExperts: an experts module of a transformers model with packed weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..call.projection import Base, Output
from ..common.other_packages import is_class
from ..formats import gguf
from ..formats.float8 import SCALE
from ..formats.format import Quantized
from ..ops.dispatch import why_only_torch
from .classes import change_class, class_over
from .experts_module import (
    Experts,
    PackedWeight,
    dense_weight,
    needs_class,
    packed_names,
    read_module,
    run_experts,
    runs_in_a_node,
    sort_weights,
    stack_in,
    weight_in,
)
from .module_parts import plain_class_of, tensor_of, why_not_tensor

_SWIZZLED = ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts")


class PackedExperts(nn.Module):
    """A mixin for classes of experts whose weights fastlora packed; PEFT's adapters lie around it.

    :func:`class_over` derives from this class and the module's.  A packed weight NAME is a
    :class:`PackedWeight` of that name.  In transformers' ``FP8Experts`` it is two parameters, in
    ``GgufExperts`` one.

    A call is one node (``ops.experts``).  Where the node can't run, the module's own forward runs
    with dense weights that are made for this call.
    """

    plain_class: type[nn.Module]  # the module's class before its weights were packed

    def forward(self, *args: Any, **named: Any) -> Tensor:
        experts = read_module(self)
        is_changed = "parametrizations" in self._modules
        reason = "its weights are parametrized" if is_changed else experts.reason
        if args and isinstance(args[0], Tensor):
            reason = reason or ("x is nested" if args[0].is_nested else why_only_torch())
        # transformers passes x, index and weights by position.
        if not (reason or named):
            up, down = (self._output(name, experts) for name in experts.names)
            if runs_in_a_node(args, (up, down)):
                return run_experts(args, experts, up, down)
        return run_dense(self, {}, args, named, reason or "its arguments are others")

    def _output(self, name: str, experts: Experts) -> Output[Any]:
        """The weight as [E, out, in], and its bias."""
        bias = tensor_of(self, f"{name}_bias") if experts.has_bias else None
        return Output(Base(stack_in(self, name), bias))

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(_sparing(self, fn), recurse)


def run_dense(
    experts: nn.Module, weights: Mapping[str, Tensor], args: tuple, named: dict, reason: str
) -> Any:
    """The call of a packed module by its class's own forward, with dense weights.

    ``weights``: dense weights by name; the others are made from the packed ones.  ``reason``: why
    no node runs the call.
    """
    kind = plain_class_of(experts)
    given = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
    packed = packed_names(experts)
    lost = [name for name in packed if weight_in(experts, name).device.type == "meta"]
    if lost and not all(x.is_meta for x in given):  # torch would compute without numbers
        raise RuntimeError(f"{lost[0]} is packed, and on meta: it isn't loaded, or offloaded")
    # x is the first floating argument, and the dense weights get its dtype.
    dtype = next((x.dtype for x in given if x.is_floating_point()), torch.float32)
    made = {name: dense_weight(experts, name, dtype) for name in packed if name not in weights}
    if gguf.is_experts(kind):  # its own forward is a GPU kernel for GGUF's blocks
        read = read_module(experts)
        # A later dict wins: given weights before unpacked ones, and both before the module's own.
        dense = {name: getattr(experts, name) for name in read.names} | made | {**weights}
        up, down = (Output(Base(dense[name])) for name in read.names)
        if read.reason or named or not runs_in_a_node(args, (up, down)):
            raise RuntimeError(f"this call of GGUF's experts can't be made: {reason}")
        return run_experts(args, read, up, down)
    forward: Any = kind.forward
    while any(n.endswith(SCALE) for n in experts._parameters) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__  # FP8Experts' undecorated forward takes dense weights
    parameters: Any = experts._parameters
    before = dict(parameters)
    try:
        # nn.Module looks a name up in _parameters first, and in _modules last.  So each dense
        # weight hides the PackedWeight of its name until the entries are restored.
        parameters.update(made, **weights)
        return forward(experts, *args, **named)
    finally:
        parameters.clear()
        parameters.update(before)


def _sparing(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` for an experts module's ``_apply``, without casts of codes and scales.

    Codes (1-byte elements) and their scales move to another device, but keep their dtype.
    """
    scales = {id(p) for name, p in module._parameters.items() if name.endswith(SCALE)}

    def apply(tensor: Tensor) -> Tensor:
        made = fn(tensor)
        if made.dtype != tensor.dtype and (tensor.element_size() == 1 or id(tensor) in scales):
            return tensor.to(made.device)
        return made

    return apply


def take_packed(module: Any, weights: Mapping[str, Quantized]) -> None:
    """Replace parameters of an experts module by these packed weights."""
    for name, weight in weights.items():
        delattr(module, name)  # torch refuses a module in the place of a parameter
        setattr(module, name, PackedWeight(weight))
    set_experts_class(module)


def set_experts_class(module: Any) -> None:
    """Set the class of a module, so that it runs its current weights, and sort these."""
    kind = plain_class_of(module)
    packed = needs_class(module)
    sort_weights(module)
    change_class(module, class_over(PackedExperts, kind, "Packed") if packed else kind)


def why_not_experts(module: nn.Module, names: Sequence[str]) -> str:
    """Why these weights of a module can't be packed as experts; "" if they can."""
    if is_class(type(module), *_SWIZZLED):
        return (
            "its MXFP4 weights have the layout of a GPU kernel: load the checkpoint with "
            "fastlora.load_packed(model, folder) into a model that isn't quantized"
        )
    experts = read_module(module)
    if experts.reason:
        return experts.reason
    if other := next((name for name in names if name not in experts.names), ""):
        return f"{other} is no weight of its experts ({', '.join(experts.names)})"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (an accelerate hook?): remove that first"
    if "parametrizations" in module._modules:
        return "its weights are parametrized: make that permanent"
    ends = ("", "_bias") if experts.has_bias else ("",)
    for name in [name + end for name in experts.names for end in ends]:
        tensor = module._parameters.get(name)
        ndim = 2 if name.endswith("_bias") else 3
        reason = "is none" if tensor is None else why_not_tensor(tensor, ndim)
        if reason and name not in packed_names(module):
            return f"its {name} {reason}: fastlora takes dense floating tensors"
    if weight_in(module, experts.names[0]).shape[0] < 2:
        return "it has only one expert"
    return ""
