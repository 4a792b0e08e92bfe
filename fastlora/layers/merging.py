"""Merges an adapter into one weight, and moves parameters whose memory a merge needs."""

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..call.projection import is_plain
from ..common.row_blocks import buffer_for, source_of, widened
from ..ops.dispatch import autocast_off


def add_product(
    base: Any, left: Tensor, right: Tensor, scale: float, merged: Tensor | None = None
) -> Tensor:
    """base + scale · left right, computed in float32 or wider, and rounded once.

    The result is written to ``merged``, or to a new tensor like the base, and returned.  The base
    may be packed, and may be a stack of experts' weights.  It is processed in blocks of rows of one
    expert, so that there is never a wide copy of the whole base.
    """
    merged = torch.empty_like(base, requires_grad=False) if merged is None else merged
    if base.dim() == 3:
        for one, one_left, one_right, into in zip(base.unbind(), left, right, merged, strict=True):
            add_product(one, one_left, one_right, scale, into)
        return merged
    wide = torch.promote_types(base.dtype, torch.float32)
    with torch.no_grad(), autocast_off(merged.device.type):
        left, right = left.to(wide), right.to(wide)
        for rows, some in widened(source_of(base), buffer_for(base, wide)):
            merged[rows] = torch.addmm(some, left[rows], right, alpha=scale)
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
