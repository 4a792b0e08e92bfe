"""Merges an adapter into one weight, and moves parameters whose memory a merge needs."""

from collections import Counter
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..call.projection import is_plain
from ..common.row_blocks import rows_at_a_time, slices
from ..ops.dispatch import autocast_off


def add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """weight + scale · left right, computed in float32 or wider, and rounded once.

    It is computed in blocks of rows, so that there is never a wide copy of the whole weight.
    """
    merged = torch.empty_like(weight, requires_grad=False)
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), autocast_off(weight.device.type):
        left, right = left.to(wide), right.to(wide)
        for rows in slices(len(weight), rows_at_a_time(weight)):
            # [rows, K] + scale · [rows, r] @ [r, K]
            merged[rows] = torch.addmm(weight[rows].to(wide), left[rows], right, alpha=scale)
    return merged


def memory_names(model: nn.Module) -> Counter[int]:
    """How many names each parameter's memory has in the model; a tied or viewed one has several."""
    named = model.named_parameters(remove_duplicate=False)
    return Counter(memory_of(parameter) for _, parameter in named if is_plain(parameter))


def memory_of(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr()


def send_to_cpu(parameter: nn.Parameter, undo: ExitStack) -> None:
    """Move a parameter to the CPU until the stack closes."""
    undo.callback(move, parameter, parameter.device)
    move(parameter, torch.device("cpu"))


def move(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Move a parameter to this device and dtype.  The parameter stays the same object."""
    dtype = dtype or parameter.dtype
    if (parameter.device, parameter.dtype) != (device, dtype):
        # Callers may be in inference mode, and a tensor that is made there can't train.
        with torch.inference_mode(False):
            parameter.data = parameter.data.to(device, dtype)
