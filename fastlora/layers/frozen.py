"""Frozen linear layers: which can be a base, and torch's own made fast without an adapter.

Your own models and PEFT's are asked the same.  What is another matter, or changes from call to
call (hooks, devices, what FSDP gathers), is asked where such a layer is met.

Where a CPU multiplies 16 bits slowly, layers that nobody adapts (the head …) cost as much as the
adapted ones do: there they become :class:`Linear`.  Elsewhere nothing changes.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..backends.products import are_wide
from ..foreign import is_class
from ..formats import SHARDED, PackedLayer, quantized_weight, vendor_of
from ..ops.dispatch import why_not_here
from ..ops.functional import lora_linears
from ..projection import HALF_DTYPES, Base, Output
from .adapted import LoRALayer, own_name, why_weight_is_fixed
from .guards import fits
from .members import (
    change_class,
    plain_class_of,
    tensor_of,
    why_not_part,
    why_not_tensor,
    why_patched,
)


class Linear(nn.Linear):
    """torch.nn.Linear, whose ordinary call is an output without adapters.

    It has the name of torch's and no state of its own: a layer becomes one, and ceases to be one,
    by its ``__class__``.  A weight that trains, has left the CPU or has no 16 bits is torch's, and
    so are exports, traces and transforms.
    """

    plain_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:  # as torch names it
        weight = slow_weight(self)
        is_own = not (why_not_here() or why_patched(nn.Linear))
        if weight is not None and is_own and fits(input, weight):
            output = Output(Base(weight, self.bias))
            return lora_linears(input, (output,), backend="torch")[0]
        return super().forward(input)


# Classes with a forward of their own that computes the same: Conv1D's weight is [in, out], and
# Falcon adds the bias last.
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_FALCON = ("transformers.models.falcon.modeling_falcon", "FalconLinear")
# Of tensors: those of FSDP2, and of shapes without data, become plain tensors by themselves.
_KINDS = ("DTensor", "FakeTensor")


def why_not_class(kind: type[nn.Module]) -> str:
    """What layers of this class are instead, if they don't compute x weightᵀ + bias; or ""."""
    is_linear = kind.forward in (nn.Linear.forward, Linear.forward)
    patched = why_patched(kind)
    if is_linear or is_conv1d(kind) or is_class(kind, *_FALCON):
        return patched and f"a {kind.__name__} ({patched})"
    name = kind.__name__ if kind.__name__ != "Linear" else f"{kind.__module__}.Linear"
    return f"a {name}, no torch.nn.Linear"


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is [in, out]."""
    return is_class(kind, *_CONV1D)


def is_router(layer: nn.Module) -> bool:
    """Whether it is a router of a transformers mixture: a class of its own, with weight [E, in]."""
    if not isinstance(layer, nn.Module):
        return False
    kind = plain_class_of(layer)
    theirs = kind.__module__.startswith("transformers.models.")
    weight = layer._parameters.get("weight")
    is_matrix = weight is not None and weight.dim() == 2
    return theirs and is_matrix and "router" in kind.__name__.lower() and kind.__base__ is nn.Module


def why_not_base(layer: nn.Module) -> str:
    """Why apply_lora can't give this module an adapter; "" if it can."""
    if isinstance(layer, LoRALayer):
        return "it already has one (fastlora.remove_lora takes it away)"
    quantized = quantized_weight(layer)
    reason = why_not_class(type(layer)) if quantized is None and not is_router(layer) else ""
    if reason:
        return f"it is {reason}"
    if isinstance(quantized, str):
        return f"it is a {type(layer).__name__}: {quantized}"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (an accelerate hook?): remove that first"
    vendor = vendor_of(layer)
    reason = why_weight_is_fixed(layer, "weight" if vendor is None else vendor.PARTS[0])
    if reason:
        return reason
    name = own_name(layer)
    if name:
        return f"it has a {name!r} of its own, which a LoRA layer has for itself: rename that"
    for name, ndim in (("bias", 1),) if vendor else (("weight", 2), ("bias", 1)):
        tensor = getattr(layer, name, None)
        is_part = type(tensor).__name__ in _KINDS
        if tensor is None and name == "weight":
            return "it has no weight"
        reason = why_not_tensor(tensor, ndim, is_part)
        if reason:
            return f"its {name} {reason}: fastlora takes dense floating tensors"
        if tensor is not None and 0 in tensor.shape and not is_part:
            return f"its {name} has shape {tuple(tensor.shape)}, and so no elements"
    return ""


def matrix_of(linear: nn.Module, kind: type[nn.Module] | None = None) -> Tensor:
    """A base's weight as [out, in]; packed, if it is a vendor's.  ``kind``: its class by itself."""
    kind = type(linear) if kind is None else kind
    quantized: Any = quantized_weight(linear, kind)
    if isinstance(quantized, PackedLayer):
        weight: Any = quantized.weight
        return weight
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(kind) else weight


def read_base(base: nn.Module, adapted: bool) -> tuple[str, Any, Any, PackedLayer | None]:
    """Why a linear layer isn't covered, "" if it is; its weight as [out, in], and its bias.

    Last, what else there is to know of a quantized one.  ``adapted``: it is the base of an adapter,
    and called so.  What watches its calls is another matter.
    """
    it, name, of = "it", "its weight", ""
    if adapted:
        it, name, of = "its base", "its base layer", "the weight of "
    kind, quantized = type(base), quantized_weight(base)
    packed = quantized if isinstance(quantized, PackedLayer) else None
    reason = why_not_class(kind) if quantized is None else ""
    if isinstance(quantized, str):
        reason = f"a {kind.__name__}: {quantized}"
    elif not reason and "parametrizations" in base._modules:  # to read it is to compute it
        reason = "parametrized"
    elif not (adapted or reason or packed is not None or "weight" in base._parameters):
        reason = "without a weight, or that is computed"
    elif packed is not None and not packed.is_whole:
        reason = f"a {kind.__name__}: {SHARDED}"
    if reason:
        return f"{it} is {reason}", None, None, None
    if packed is not None:
        weight: Any = packed.weight
        reason = f"{name} is on the meta device" if weight.device.type == "meta" else ""
    else:
        weight = tensor_of(base, "weight")
        shape = weight.shape if weight.dim() == 2 else (0, 0)
        reason = why_not_part(name, weight, shape, of)
        if is_conv1d(kind) and not reason:
            weight = weight.T
    bias = tensor_of(base, "bias")
    if bias is not None and not reason:
        reason = why_not_part("its base's bias" if adapted else "its bias", bias, weight.shape[:1])
    return reason, weight, bias, packed


def slow_weight(layer: nn.Linear) -> Tensor | None:
    """The layer's weight, if it is frozen and a CPU may multiply it slowly."""
    weight = layer._parameters.get("weight")  # where a parametrized one isn't
    if weight is None or weight.dtype not in HALF_DTYPES or weight.device.type != "cpu":
        return None
    return None if weight.requires_grad else weight


def take_frozen(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer fast that gains by it, and return those that weren't before."""
    layers = [layer for layer in layers if _gains(layer)]
    for layer in layers:
        change_class(layer, nn.Linear, Linear)
    return layers


def give_back_frozen(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer torch's again, and return those that were fast."""
    layers = [layer for layer in layers if isinstance(layer, Linear)]
    for layer in layers:
        change_class(layer, Linear, nn.Linear)
    return layers


def _gains(layer: nn.Module) -> bool:
    """Whether it is a plain frozen layer, and this device multiplies its weight slowly."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or why_patched(nn.Linear):
        return False
    weight, bias = slow_weight(layer), layer.bias
    if weight is None or why_not_tensor(weight, 2) or why_not_tensor(bias, 1):
        return False
    same = bias is None or bias.dtype == weight.dtype
    return same and weight.numel() > 0 and not weight.is_inference() and are_wide(weight)
