"""Dispatch: the path of a call under torch's present modes, and autocast.

A call takes one of three paths.  They compute the same formula:

* The autograd node (:mod:`.node`) runs a backend directly.  Plain eager calls take it.
* The registered op (:mod:`.library`) runs the same code through torch's dispatcher, for
  ``torch.compile``, export, tensor subclasses and dispatch modes.
* The composite path (:mod:`.composite`) consists of torch's own operations, for nested tensors,
  ``torch.func``, forward-mode differentiation and tracing.

Autocast casts x and the weight as in ``nn.Linear``, on all paths.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call.projection import AUTOCAST_DTYPES, Output, is_plain

NODE, OP, COMPOSITE = "node", "op", "composite"
_OFF = nullcontext()


def path_of(x: Tensor, is_cut: bool = False) -> str:
    """The path of a call with this x now.

    ``is_cut``: whether a tensor holds the ends of segments, as with experts and many adapters.
    """
    if x.is_nested or why_only_torch():
        return COMPOSITE
    # A dispatch mode is selective checkpointing, a FLOP counter …  On meta, ends have no values.
    in_mode = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return OP if in_mode or not is_plain(x) or (is_cut and x.is_meta) else NODE


def why_only_torch() -> str:
    """The reason if a mode of torch is active that supports only torch's own operations; or ""."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    # The level is -1 outside of forward_ad.dual_level().
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return "the call is being traced" if torch._C._get_tracing_state() is not None else ""


def why_not_here() -> str:
    """Why an optimized module runs its original forward now; "" if it needn't."""
    if torch.compiler.is_compiling() and torch.compiler.is_exporting():
        return "the model is being exported"  # an exported program should need only PyTorch
    return why_only_torch()


def is_eager(x: Tensor) -> bool:
    """Whether a node of several calls can take x; unlike NODE, dispatch modes are allowed."""
    only_torch = x.is_nested or why_only_torch()
    return not (only_torch or torch.compiler.is_compiling()) and is_plain(x)


def follows(x: object) -> bool:
    """Whether autograd records calls with x now, and x takes the node.

    Then a gated MLP, for example, can run as nodes that save less than its layers.
    """
    return torch.is_grad_enabled() and isinstance(x, Tensor) and path_of(x) == NODE


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for a device type; torch refuses the question for meta."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts calls with this x now; None if it is off."""
    if not torch._C._is_any_autocast_enabled() or not autocast_is_on(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def autocast_inputs(
    x: Tensor, outputs: Sequence[Output[Tensor]]
) -> tuple[Tensor, Sequence[Output[Tensor]]]:
    """x and the weights in autocast's dtype.

    float64 tensors and packed weights aren't cast.  Backends cast adapters and biases when they
    read them.
    """
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype not in AUTOCAST_DTYPES:
        return x, outputs
    return x.to(dtype), [
        Output(base._replace(weight=base.weight.to(dtype)), adapters)
        if isinstance(base.weight, Tensor) and base.weight.dtype in AUTOCAST_DTYPES
        else Output(base, adapters)
        for base, adapters in outputs
    ]


def autocast_off(device_type: str) -> AbstractContextManager:
    """A context without autocast, so that torch's products keep the dtypes of their inputs."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else _OFF
