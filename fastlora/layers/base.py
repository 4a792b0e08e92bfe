"""What a base may be: the class and the tensors of the frozen layer that an adapter goes with.

Your own models and PEFT's are asked the same.  What is another matter, or changes from call to
call (hooks, devices, what FSDP gathers), is asked where such a layer is met.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import is_class, is_dtensor
from ..projection import DTYPES, is_plain
from ..quant import PackedLayer, quantised_weight
from . import frozen

# As they are at import: others may replace them, as make_fx does while it traces.
_LINEAR_FORWARDS = (nn.Linear.forward, frozen.Linear.forward)
_MODULE_CALL = nn.Module.__call__
# Classes with a forward of their own that computes the same: Conv1D's weight is [in, out], and
# Falcon adds the bias last.
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_FALCON = ("transformers.models.falcon.modeling_falcon", "FalconLinear")


def why_not_class(kind: type[nn.Module]) -> str:
    """What layers of this class are instead, if they don't compute x weightᵀ + bias; or ""."""
    forward = getattr(kind, "forward", None)
    known = forward in _LINEAR_FORWARDS or is_conv1d(kind) or is_class(kind, *_FALCON)
    if known and kind.__call__ is _MODULE_CALL:
        return ""
    return f"a {kind.__name__}, no torch.nn.Linear"


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is [in, out]."""
    return is_class(kind, *_CONV1D)


def is_router(layer: nn.Module) -> bool:
    """Whether it is a router of a transformers mixture: a class of its own, with weight [E, in]."""
    if not isinstance(layer, nn.Module):
        return False
    kind = getattr(layer, "plain_class", type(layer))
    theirs = kind.__module__.startswith("transformers.models.")
    weight = layer._parameters.get("weight")
    is_matrix = weight is not None and weight.dim() == 2
    return theirs and is_matrix and "router" in kind.__name__.lower() and kind.__base__ is nn.Module


def matrix_of(linear: nn.Module, kind: type[nn.Module] | None = None) -> Tensor:
    """A base's weight as [out, in]; packed, if it is a vendor's.  ``kind``: its class by itself."""
    kind = type(linear) if kind is None else kind
    found: Any = quantised_weight(linear, kind)
    if isinstance(found, PackedLayer):
        found = found.weight
        return found
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(kind) else weight


def tensor_of(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, sooner; a parametrised weight or FSDP's is no parameter there."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def why_not_tensor(tensor: Tensor, ndim: int, is_part: bool = False) -> str:
    """What is wrong with a weight (2 dimensions) or a bias (1), as "has dtype torch.int8"; or "".

    ``is_part``: it is FSDP's part between calls, which find it whole, and of torch's own class.
    """
    if not (is_plain(tensor) or is_part):
        hint = "sharded" if is_dtensor(tensor) else "quantised"
        return f"is of class {type(tensor).__name__} ({hint}?)"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}"
    if tensor.dim() != ndim and not is_part:
        return f"has shape {tuple(tensor.shape)} (sharded, and not gathered?)"
    return "" if tensor.dtype in DTYPES else f"has dtype {tensor.dtype}"
