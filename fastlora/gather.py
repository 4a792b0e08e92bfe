"""Tensors of a model whole, where FSDP or FSDP2 keeps each rank's part of them."""

import sys
from typing import cast

import torch
from torch import Tensor, nn

from .modules import plain_name, unwrap


def whole_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the same keys; those that train and are sharded are gathered.

    torch's own state-dict functions do it, for the model in all its wrappers, and every rank must
    call it then.  Raises ValueError for a sharded tensor that they don't give, e.g. a frozen one.
    """
    sharded = {key: tensor for key, tensor in tensors.items() if is_sharded(tensor)}
    if not sharded:
        return tensors
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # Without cpu_offload: on a CPU torch 2.13 ends the process in it, under FSDP1.
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    gathered = get_model_state_dict(model, options=options)
    names = {id(p): plain_name(name) for name, p in unwrap(model).named_parameters()}
    found = dict(tensors)
    for key, tensor in sharded.items():
        name = names.get(id(tensor), "")
        if name not in gathered:
            raise ValueError(f"{key} is sharded and doesn't train, so that FSDP doesn't gather it")
        found[key] = cast(Tensor, gathered[name])
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is FSDP's, which has a part of it between calls."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return is_flattened(tensor) or isinstance(tensor, dtensor)


def is_flattened(tensor: Tensor) -> bool:
    """Whether it is a part of one of FSDP1's flat parameters, of whatever shape between calls."""
    return getattr(tensor, "_fsdp_flattened", False)


def writes_files() -> bool:
    """Whether this rank writes what all ranks have gathered: the first one does."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
