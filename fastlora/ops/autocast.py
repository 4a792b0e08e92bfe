"""``torch.autocast`` at the op's door: x and weight are cast as ``nn.Linear`` casts them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..projection import AUTOCAST_DTYPES, Output

_OFF = nullcontext()


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
