"""Frozen linear layers: which of them can have an adapter, and a fast forward without an adapter.

The checks are the same for plain models and PEFT models.  Conditions that change from call to call
(hooks, devices, tensors that FSDP gathers) are checked at the call.

Some CPUs multiply 16-bit numbers slowly.  There, frozen layers without an adapter (the head …)
would take as long as the adapted layers, so they become :class:`Linear`.  On other devices their
class doesn't change.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..backends.products import are_wide
from ..call.projection import HALF_DTYPES, Base, Output
from ..common.other_packages import is_class
from ..formats import SHARDED, PackedLayer, quantized_weight
from ..ops.dispatch import why_not_here
from ..ops.functional import lora_linears
from .classes import Fast
from .guards import LinearRecord, fits_weight
from .module_parts import (
    is_hooked,
    plain_class_of,
    tensor_of,
    why_not_part,
    why_not_tensor,
    why_patched,
)

WATCHED = "a hook watches, or something replaces, its calls"


class Linear(Fast, nn.Linear):
    """torch.nn.Linear with fastlora's product for CPUs that multiply 16-bit numbers slowly.

    It has the name of torch's class and no state of its own, so a module changes between the two by
    an assignment to ``__class__``.  torch's forward runs if the weight trains, isn't on the CPU or
    doesn't have 16 bits, and in exports, traces and transforms.
    """

    plain_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:  # torch's name for the argument
        weight = slow_weight(self)
        is_own = not (why_not_here() or why_patched(nn.Linear))
        if weight is not None and is_own and fits_weight(input, weight):
            # Only the torch backend has this product, so the call names it.
            output = Output(Base(weight, self.bias))
            return lora_linears(input, (output,), backend="torch")[0]
        return super().forward(input)


# Other classes that compute x weightᵀ + bias.  Conv1D stores the weight as [in, out].  Falcon adds
# the bias in a separate step.
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_FALCON = ("transformers.models.falcon.modeling_falcon", "FalconLinear")


def why_not_class(kind: type[nn.Module]) -> str:
    """Why a class may not compute x weightᵀ + bias, as a phrase ("a Conv2d, …"); "" if it does."""
    # A subclass that inherits nn.Linear's forward computes the same.
    is_linear = getattr(kind, "forward", None) in (nn.Linear.forward, Linear.forward)
    patched = why_patched(kind)
    if is_linear or is_conv1d(kind) or is_class(kind, *_FALCON):
        return patched and f"a {kind.__name__} ({patched})"
    # Other packages have classes named Linear, which only their module tells apart.
    name = kind.__name__ if kind.__name__ != "Linear" else f"{kind.__module__}.Linear"
    return f"a {name}, no torch.nn.Linear"


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether the class is transformers' Conv1D, a linear layer with weight [in, out]."""
    return is_class(kind, *_CONV1D)


def is_router(layer: nn.Module) -> bool:
    """Whether this is a mixture's router in transformers: a class of its own, weight [E, in]."""
    if not isinstance(layer, nn.Module):
        return False
    kind = plain_class_of(layer)
    theirs = kind.__module__.startswith("transformers.models.")
    weight = layer._parameters.get("weight")
    is_matrix = weight is not None and weight.dim() == 2
    return theirs and is_matrix and "router" in kind.__name__.lower() and kind.__base__ is nn.Module


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether its class is torch's nn.Linear, or fastlora's frozen one."""
    return type(layer) in (nn.Linear, Linear)


def why_not_plain(linear: Any) -> str:
    """Why it isn't a plain ``torch.nn.Linear`` with floating tensors; "" if it is."""
    if not is_plain_linear(linear):
        return f"it is a {type(linear).__name__}, no torch.nn.Linear"
    if "forward" in vars(linear):
        return "its forward was replaced on the instance (an accelerate hook?): remove that first"
    if "weight" not in linear._parameters:
        return "its weight is computed (a parametrization): make that permanent"
    for name, ndim in (("weight", 2), ("bias", 1)):
        tensor = getattr(linear, name)
        if reason := why_not_tensor(tensor, ndim):
            return f"its {name} {reason}: it must be a dense floating tensor"
        if tensor is not None and 0 in tensor.shape:
            return f"its {name} has shape {tuple(tensor.shape)}, and so no elements"
    return ""


def matrix_of(linear: nn.Module, kind: type[nn.Module] | None = None) -> Tensor:
    """A linear layer's weight as [out, in]; the packed weight of a vendor's quantized layer.

    ``kind``: the layer's class before it got an adapter, if it has one.
    """
    kind = kind or type(linear)
    quantized: Any = quantized_weight(linear, kind)
    is_packed = isinstance(quantized, PackedLayer)
    weight: Any = quantized.weight if is_packed else linear.weight
    return weight.t() if is_conv1d(kind) and not is_packed else weight


def read_base(base: nn.Module, adapted: bool) -> tuple[str, Any, Any, PackedLayer | None]:
    """Read a linear layer: (reason, weight [out, in], bias, packed layer or None).

    The reason says why the fast path can't compute the layer; it is "" if it can.  The packed layer
    describes a quantized layer.  ``adapted``: whether the layer is an adapter's base; the reason
    then says "its base".  Hooks aren't checked here.
    """
    # Words of the reasons: the layer, its weight, and a prefix of the weight.
    it, name, of = "it", "its weight", ""
    if adapted:
        it, name, of = "its base", "its base layer", "the weight of "
    kind, quantized = type(base), quantized_weight(base)
    packed = quantized if isinstance(quantized, PackedLayer) else None
    reason = why_not_class(kind) if quantized is None else ""
    if isinstance(quantized, str):
        reason = f"a {kind.__name__}: {quantized}"
    elif not reason and "parametrizations" in base._modules:  # reading the weight would compute it
        reason = "parametrized"
    elif not (adapted or reason or packed is not None or "weight" in base._parameters):
        reason = "without a weight parameter"
    elif packed is not None and not packed.is_whole:
        reason = f"a {kind.__name__}: {SHARDED}"
    if reason:
        return f"{it} is {reason}", None, None, None
    if packed is not None:
        weight: Any = packed.weight
        reason = f"{name} is on the meta device" if weight.device.type == "meta" else ""
    else:
        weight = tensor_of(base, "weight")
        # Any matrix is supported.  With (0, 0), why_not_part reports other numbers of dimensions.
        shape = weight.shape if weight.dim() == 2 else (0, 0)
        reason = why_not_part(name, weight, shape, of)
        if is_conv1d(kind) and not reason:
            weight = weight.T
    bias = tensor_of(base, "bias")
    if bias is not None and not reason:
        reason = why_not_part("its base's bias" if adapted else "its bias", bias, weight.shape[:1])
    return reason, weight, bias, packed


def read_frozen(linear: nn.Module) -> LinearRecord:
    """Read a linear layer without an adapter: a part of a gated MLP, or a model's head."""
    if is_hooked(linear):
        return LinearRecord(WATCHED)
    reason, weight, bias, packed = read_base(linear, adapted=False)
    if packed is not None and packed.rounds_input:
        kind = type(linear).__name__
        reason = f"it is a {kind} without an adapter, whose own forward rounds its input"
    if reason:
        return LinearRecord(reason)
    return LinearRecord("", (Output(Base(weight, bias)),), (packed,))


def slow_weight(layer: nn.Linear) -> Tensor | None:
    """The layer's weight if it is frozen, has 16 bits and is on the CPU; else None."""
    weight = layer._parameters.get("weight")  # a parametrized weight isn't there
    if weight is None or weight.dtype not in HALF_DTYPES or weight.device.type != "cpu":
        return None
    return None if weight.requires_grad else weight


def frozen_classes(layers: Iterable[nn.Module]) -> dict[nn.Module, type[Linear]]:
    """Maps each layer that is faster as a :class:`Linear` on this device to that class."""
    return {layer: Linear for layer in layers if _gains(layer)}


def _gains(layer: nn.Module) -> bool:
    """Whether this is a plain frozen layer whose weight the device multiplies slowly."""
    if type(layer) is not nn.Linear or why_not_plain(layer) or why_patched(nn.Linear):
        return False
    weight, bias = slow_weight(layer), layer.bias
    # Autograd can't save a tensor of inference mode for the backward.
    if weight is None or weight.is_inference():
        return False
    return (bias is None or bias.dtype == weight.dtype) and are_wide(weight)
