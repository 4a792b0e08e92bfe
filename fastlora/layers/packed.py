"""Experts' weights that are packed: where a module keeps them, and how it runs with them."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.format import Quantised
from ..ops.way import why_textbook
from ..projection import Adapter, Base, Output
from ..quant import float8, gguf
from ..quant.float8 import SCALE
from .adapted import run_with
from .experts import Experts, read_experts_module, run_experts, takes
from .members import class_over, tensor_of

_DOWN = "down_proj"  # the last of the weights in every class of experts


class PackedWeight(nn.Module):
    """A stack [E, N, K] in the place of an experts module's parameter: packed, and never trained.

    Its buffers are named as the format's tensors are, and hold their bits as uint8: casts of the
    model leave them alone.
    """

    def __init__(self, weight: Quantised) -> None:
        super().__init__()
        self.format = weight.format
        self._dtypes = tuple(tensor.dtype for tensor in weight.tensors)
        for name, tensor in zip(weight.format.names, weight.tensors, strict=True):
            self.register_buffer(name, tensor.detach().contiguous().view(torch.uint8))

    @property
    def quantised(self) -> Quantised:
        """The stack, of the same memory."""
        bits = [self._buffers[name] for name in self.format.names]
        tensors = [b.view(d) for b, d in zip(bits, self._dtypes, strict=True) if b is not None]
        return Quantised(self.format, tuple(tensors))

    # [E, N, K], whichever way a dense weight would lie in this module; the format's dtype.
    shape = property(lambda self: self.quantised.shape)
    dtype = property(lambda self: self.quantised.dtype)
    device = property(lambda self: self.quantised.device)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.format.label}"


class PackedExperts(nn.Module):
    """An experts module's class, which comes after this one, whose weights may be packed.

    Methods and no constructor.  A packed weight NAME is a :class:`PackedWeight` of that name, or in
    transformers' ``FP8Experts`` two parameters, in ``GgufExperts`` one.  A call is one node
    (``ops.experts``).  What that can't be is the module's own forward with dense weights, made for
    that call.
    """

    plain_class: type[nn.Module]  # what it is with dense weights, and without adapters
    # Without adapters it has none of these.
    adaptations: Mapping[str, Any] = MappingProxyType({})
    _bases: Any = MappingProxyType({})
    lora_dropout = 0.0

    def forward(self, *args: Any, **named: Any) -> Tensor:
        experts = self.read()
        reason = experts.reason
        if args and isinstance(args[0], Tensor):
            reason = reason or why_textbook(args[0])
        if not (reason or named):
            up, down = (self._output(name, experts) for name in experts.names)
            if takes(args, (up, down)):
                dropout = self.lora_dropout if self.training else 0.0
                return run_experts(args, experts, up, down, dropout)
        return self._by_its_own_forward(reason or "its arguments are others", args, named)

    def read(self) -> Experts:
        """How a call computes, or why it is the module's own forward's."""
        experts = read_experts_module(self, self.plain_class)
        if "parametrizations" in self._modules:
            return Experts("its weights are parametrised")
        return experts

    def _output(self, name: str, experts: Experts) -> Output[Any]:
        weight = weight_in(self, name)
        bias = tensor_of(self, f"{name}_bias") if experts.has_bias else None
        if experts.transposed and isinstance(weight, Tensor):
            weight = weight.mT
        return Output(Base(weight, bias), self.adapters_of(name))

    def adapters_of(self, name: str) -> tuple[Adapter[Tensor], ...]:
        """Those that a call adds to the weight of this name."""
        return ()

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(sparing(self, fn), recurse)

    def _by_its_own_forward(self, reason: str, args: tuple, named: dict) -> Tensor:
        """The class's forward with the sums in place of the weights, and dense packed ones."""
        if gguf.is_experts(self.plain_class):  # whose own is a GPU's kernel for blocks
            raise RuntimeError(f"this call of GGUF's experts can't be made: {reason}")
        adapted, packed = self.adaptations.keys() - self._bases.keys(), set(packed_names(self))
        if self.lora_dropout and self.training and adapted:
            raise RuntimeError(f"this call of experts can't have lora_dropout: {reason}")
        if not self._parameters.keys() | packed >= adapted:
            raise RuntimeError(f"this call of experts can't have its adapters: {reason}")
        given = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
        lost = [name for name in packed if weight_in(self, name).device.type == "meta"]
        if lost and not all(x.is_meta for x in given):  # torch would go on without numbers
            raise RuntimeError(f"{lost[0]} is packed, and on meta: it isn't loaded, or offloaded")
        dtype = next((x.dtype for x in given if x.is_floating_point()), torch.float32)
        weights = {name: self.sum_of(name, dtype) for name in adapted}
        weights |= {name: dense_weight(self, name, dtype) for name in packed - adapted}
        forward: Any = self.plain_class.forward
        while any(n.endswith(SCALE) for n in self._parameters) and hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__  # FP8Experts', where weights may be dense
        return run_with(self, weights, partial(forward, self), args, named)

    def sum_of(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weight of this name with its adapter; in this dtype, if it is packed."""
        raise NotImplementedError


def sparing(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What an experts module's ``_apply`` does to its tensors, but no cast of codes and scales."""
    scales = {id(p) for name, p in module._parameters.items() if name.endswith(SCALE)}

    def apply(tensor: Tensor) -> Tensor:
        made = fn(tensor)
        if made.dtype != tensor.dtype and (tensor.element_size() == 1 or id(tensor) in scales):
            return tensor.to(made.device)
        return made

    return apply


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """The class that an experts module has with dense weights, and without adapters."""
    return module.plain_class if isinstance(module, PackedExperts) else type(module)


def read_module(module: nn.Module) -> Experts:
    """How a module's experts compute, packed, adapted or neither; or why that isn't known."""
    return read_experts_module(module, plain_class_of(module))


def take_packed(module: Any, weights: Mapping[str, Quantised]) -> None:
    """Let an experts module have these packed weights in the place of its parameters."""
    for name, weight in weights.items():
        delattr(module, name)
        setattr(module, name, PackedWeight(weight))
    settle(module)


def settle(module: Any) -> None:
    """Give a module without adapters the class that runs the weights that it has now."""
    kind = plain_class_of(module)
    its_class = class_over(PackedExperts, kind, "Packed") if needs_class(module) else kind
    object.__setattr__(module, "__class__", its_class)


def needs_class(module: nn.Module) -> bool:
    """Whether the plain class couldn't run it: a weight is a :class:`PackedWeight`, or a dense one
    in a class for float8."""
    return bool(_held(module)) or bool({*_scaled(module)} - {*packed_names(module)})


def packed_names(module: nn.Module) -> list[str]:
    """Of the module's weights that are packed."""
    codes = [name for name in _scaled(module) if tensor_of(module, name).element_size() == 1]
    return _held(module) + codes


def _held(module: nn.Module) -> list[str]:
    return [name for name, each in module._modules.items() if isinstance(each, PackedWeight)]


def _scaled(module: nn.Module) -> list[str]:
    """Of the weights that came packed: FP8Experts', with scales beside, and GgufExperts'."""
    ends = [name.removesuffix(SCALE) for name in module._parameters if name.endswith(SCALE)]
    if gguf.is_experts(plain_class_of(module)):
        ends = [*read_module(module).names]
    return [name for name in ends if isinstance(getattr(module, name, None), Tensor)]


def parameter_names(module: nn.Module) -> list[str]:
    """What a module has for parameters, packed ones among them; weights of experts in the order of
    their class."""
    return sorted([*_held(module), *module._parameters], key=_DOWN.__eq__)


def weight_in(module: nn.Module, name: str) -> Any:
    """A weight as it lies: a tensor, or packed [E, N, K].

    Raises ValueError for a packed one that can't be read.
    """
    held = module._modules.get(name)
    if isinstance(held, PackedWeight):
        return held.quantised
    weight = tensor_of(module, name)
    if name not in _scaled(module) or weight.element_size() > 1:
        return weight
    is_gguf = gguf.is_experts(plain_class_of(module))
    weight = (gguf if is_gguf else float8).experts_weight(module, name)
    if isinstance(weight, str):
        raise ValueError(f"the {plain_class_of(module).__name__} can't be read: {weight}")
    return weight


def dense_weight(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """A packed weight in this dtype, new, as it would lie in this module."""
    made = weight_in(module, name).dense(dtype)
    return made.mT if getattr(module, "is_transposed", False) else made
