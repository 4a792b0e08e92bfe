"""The weights of an experts module: where it keeps each, dense or packed."""

from typing import Any

import torch
from torch import Tensor, nn

from ..formats.format import Quantised
from ..quant import float8, gguf
from ..quant.float8 import SCALE
from .adapted import Features
from .experts import Experts, read_experts_module
from .members import plain_class_of, tensor_of

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


def read_module(module: nn.Module) -> Experts:
    """How a module's experts compute, packed, adapted or neither; or why that isn't known."""
    return read_experts_module(module, plain_class_of(module))


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


def stack_in(module: nn.Module, name: str) -> Any:
    """:func:`weight_in` as [E, out, in], whichever way a dense one lies in this module."""
    weight = weight_in(module, name)
    lies_transposed = isinstance(weight, Tensor) and getattr(module, "is_transposed", False)
    return weight.mT if lies_transposed else weight


def dense_weight(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """A packed weight in this dtype, new, as it would lie in this module."""
    made = weight_in(module, name).dense(dtype)
    return made.mT if getattr(module, "is_transposed", False) else made


def features_of(module: nn.Module, name: str) -> Features:
    """Of the weight of this name."""
    experts, q, p = stack_in(module, name).shape
    return Features(experts, p, q, bool(getattr(module, "is_transposed", False)))
