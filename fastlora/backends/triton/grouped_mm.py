"""torch's grouped_mm: one kernel for the products of all experts, on devices that have it."""

from functools import cache

import torch
from torch import Tensor

# Limits of torch's grouped_mm: strides and addresses are multiples of 16 bytes; most experts.
_ALIGNMENT, _MOST_EXPERTS = 16, 1023


def has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm runs as one kernel for this call, without reading offsets on the host."""
    if not (len(x) and _takes(x, weight)):
        return False
    return x.dtype == torch.bfloat16 and _has_kernel(x.device)


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes this weight.  (x and dy are copied if it doesn't take them.)"""
    if x.dtype == torch.float64 or len(weight) > _MOST_EXPERTS:
        return False
    # unit: the elements in 16 bytes.  last: the strides of the weight's rows and columns.
    unit, last = _ALIGNMENT // x.element_size(), weight.stride()[1:]
    if any(size % unit for size in weight.shape[1:]) or weight.data_ptr() % _ALIGNMENT:
        return False
    rows, columns = weight.shape[1:]
    # Row-major or column-major, and no two elements overlap.
    dense = last[0] >= columns if last[1] == 1 else last[0] == 1 and last[1] >= rows
    return dense and not max(last) % unit and not weight.stride(0) % unit


@cache
def _has_kernel(device: torch.device) -> bool:
    """Whether grouped_mm is one kernel in bfloat16.  If not, torch loops over the offsets."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def aligned(matrix: Tensor) -> Tensor:
    """The matrix, or a contiguous copy if grouped_mm's alignment requires one."""
    first, last = matrix.stride()
    size = matrix.element_size()
    fits = last == 1 and first >= matrix.shape[1] and not first * size % _ALIGNMENT
    if fits and not matrix.data_ptr() % _ALIGNMENT:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)
