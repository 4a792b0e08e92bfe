"""A frozen ``nn.Linear`` without an adapter, as fastlora runs it, and which calls it takes.

Where a CPU multiplies 16 bits slowly, such layers (the head, projections that nobody adapts) cost
as much as the adapted ones do.  :mod:`.beside` says which layers become one.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..formats.format import Quantised
from ..ops import lora_linears
from ..projection import AUTOCAST_DTYPES, DTYPES, HALF_DTYPES, Base, Output, is_plain


class Linear(nn.Linear):
    """torch.nn.Linear, whose ordinary call is an output without adapters.

    It has the name of torch's and no state of its own: a layer becomes one, and ceases to be one,
    by its ``__class__``.  A weight that trains, has left the CPU or has no 16 bits is torch's, and
    so are exports, traces and transforms.
    """

    def forward(self, input: Tensor) -> Tensor:  # as torch names it
        weight = slow_weight(self)
        if weight is not None and not why_not_here() and fits(input, weight):
            output = Output(Base(weight, self.bias))
            return lora_linears(input, (output,), backend="torch")[0]
        return super().forward(input)


def slow_weight(layer: nn.Linear) -> Tensor | None:
    """The layer's weight, if it is frozen and a CPU may multiply it slowly."""
    weight = layer._parameters.get("weight")  # where a parametrised one isn't
    if weight is None or weight.dtype not in HALF_DTYPES or weight.device.type != "cpu":
        return None
    return None if weight.requires_grad else weight


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the fast path takes this x beside this base weight [out, in].

    What it doesn't take, PEFT or torch may convert or refuse.
    """
    if not is_plain(x) or x.is_nested or x.layout is not torch.strided:
        return False
    if x.device != weight.device:
        return False
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    if isinstance(weight, Quantised):
        return x.dtype in DTYPES
    return x.dtype == weight.dtype or (
        x.dtype in AUTOCAST_DTYPES
        and weight.dtype in AUTOCAST_DTYPES
        and torch.is_autocast_enabled(x.device.type)
    )


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
