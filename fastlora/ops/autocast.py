"""``torch.autocast`` at the op's door: x and weight are cast as ``nn.Linear`` casts them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..projection import Projection

AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OFF = nullcontext()


def autocast_is_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_inputs(
    x: Tensor, projections: Sequence[Projection]
) -> tuple[Tensor, Sequence[Projection]]:
    """x and the weights in autocast's dtype.

    float64 stays as it is; adapters and biases are cast later, as they are read.
    """
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype not in AUTOCAST_DTYPES:
        return x, projections
    return x.to(dtype), [
        projection._replace(weight=projection.weight.to(dtype))
        if projection.weight is not None and projection.weight.dtype in AUTOCAST_DTYPES
        else projection
        for projection in projections
    ]


def autocast_off(device_type: str) -> AbstractContextManager:
    """Inside, torch's own products run in the dtypes that they are given."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else _OFF
