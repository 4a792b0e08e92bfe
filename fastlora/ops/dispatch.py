"""Dispatch: which path a call takes under torch's modes at this moment, and autocast.

The paths are the autograd node, the registered op, and the composite one, by torch's own
operations.  The op handles autocast: x and the weight are cast as ``nn.Linear`` casts them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.products import is_slow
from ..formats.format import Quantized
from ..projection import AUTOCAST_DTYPES, HALF_DTYPES, Output, is_plain

NODE, OP, COMPOSITE = "node", "op", "composite"
# Up to so many rows a node costs more than it saves (docs/performance.md).
MOST_ROWS = 32
_OFF = nullcontext()


def path_of(x: Tensor, is_cut: bool = False) -> tuple[str, str]:
    """The path of a call with this x at this moment, and why it isn't the node; "" if it is.

    ``is_cut``: its rows are cut by numbers in a tensor, which only a real one has.
    """
    reason = why_composite(x)
    if reason:
        return COMPOSITE, reason
    if torch.compiler.is_compiling():
        return OP, "it is compiled"
    if not is_plain(x):
        return OP, f"x is a {type(x).__name__}"
    if torch._C._len_torch_dispatch_stack():  # selective checkpointing, a FLOP counter …
        return OP, "a dispatch mode follows torch's operations"
    if is_cut and x.is_meta:
        return OP, "on meta the ends of segments hold nothing"
    return NODE, ""


def why_composite(x: Tensor) -> str:
    """Why a node can't follow x, or what is done with the call; "" if it can."""
    if x.is_nested:
        return "x is nested"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return "the call is being traced" if torch._C._get_tracing_state() is not None else ""


def why_not_here() -> str:
    """Why a call that was torch's or PEFT's stays theirs at this moment; "" if it needn't."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():  # the program should need PyTorch alone
            return "the model is being exported"
    elif torch.jit.is_tracing():
        return "the model is being traced"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return ""


def is_eager(x: Tensor) -> bool:
    """Whether a node of several calls can follow x; it may run under a dispatch mode."""
    return not (why_composite(x) or torch.compiler.is_compiling()) and is_plain(x)


def is_ordinary(x: object) -> bool:
    """Whether nothing but autograd follows a call made at this moment with this x."""
    return isinstance(x, Tensor) and path_of(x)[0] == NODE


def follows(x: object) -> bool:
    """Whether a composition of calls with this x now can be nodes that keep less than its steps."""
    return torch.is_grad_enabled() and is_ordinary(x)


def has_few_rows(x: Tensor) -> bool:
    return x.is_cpu and x.dim() > 0 and 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def is_few(x: Tensor, outputs: Sequence[Output[Tensor]], backend: str) -> bool:
    """Whether x has few rows on a CPU, and one output, so that a node would be the slower way.

    There a call is all overhead, and a node of Python costs more than all of its products.
    """
    if backend != "torch" or len(outputs) > 1 or not has_few_rows(x):
        return False
    ((weight, _), adapters), dtype = outputs[0], x.dtype
    if isinstance(weight, Quantized):
        return False
    if dtype in HALF_DTYPES and is_slow(dtype):
        return False
    # 16-bit adapters aren't: torch would round h before it is scaled.
    wide = torch.promote_types(dtype, torch.float32)
    return all([a.dtype == b.dtype == wide for a, b, _ in adapters])


def autocast_is_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """In which dtype autocast now runs calls with this x; None where it is off."""
    if not torch._C._is_any_autocast_enabled() or not autocast_is_on(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def autocast_inputs(
    x: Tensor, outputs: Sequence[Output[Tensor]]
) -> tuple[Tensor, Sequence[Output[Tensor]]]:
    """x and the weights in autocast's dtype.

    float64 stays as it is, and so does a packed weight; adapters and biases are cast later, as they
    are read.
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
    """Inside, torch's own products run in the dtypes that they are given."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else _OFF
