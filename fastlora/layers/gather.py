"""Tensors of a model whole, where FSDP or FSDP2 keeps each rank's part of them."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..foreign import FULLY_SHARDED, derived_from, is_dtensor
from .modules import plain_name, unwrap


def whole_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the same keys; those that are sharded are gathered.

    The model is given in all its wrappers, and every rank must call it.  Raises ValueError for
    tensors of DeepSpeed's ZeRO-3.
    """
    _refuse_partitioned(tensors)
    state = _whole_state(model, [t for t in tensors.values() if is_flattened(t)])
    names = {id(p): plain_name(name) for name, p in unwrap(model).named_parameters()}
    found = dict(tensors)
    for key, tensor in tensors.items():
        if is_flattened(tensor):
            found[key] = state[names[id(tensor)]]
        elif is_dtensor(tensor):
            part: Any = tensor
            found[key] = part.to(part.device_mesh.device_type).full_tensor()
    return found


def copy_whole(value: Tensor, parameter: Tensor) -> None:
    """Copy a tensor into a parameter, of which FSDP2 may have this rank's part."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        part: Any = parameter
        # Every rank has the whole: none sends it to the others.
        value = distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)
    parameter.copy_(value)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 give up the whole parameters that a call has left, which it would not keep."""
    for module in model.modules():
        if derived_from(type(module), *FULLY_SHARDED):
            cast(Any, module).reshard()


def _whole_state(model: nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
    """The state dict with these tensors, of FSDP1's flat parameters, if there are any."""
    if not tensors:
        return {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # Without cpu_offload: on a CPU torch 2.13 ends the process in it, under FSDP1.
    options = StateDictOptions(
        full_state_dict=True, ignore_frozen_params=all(t.requires_grad for t in tensors)
    )
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def _refuse_partitioned(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for a parameter that is ZeRO-3's, and empty between calls."""
    for key, tensor in tensors.items():
        if getattr(tensor, "ds_shape", tensor.shape) != tensor.shape:
            raise ValueError(
                f"DeepSpeed ZeRO-3 has parts of {key} on all ranks: call this inside of "
                "deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is FSDP's, which has a part of it between calls."""
    return is_flattened(tensor) or is_dtensor(tensor)


def has_sharded(module: nn.Module) -> bool:
    return any(map(is_sharded, module.parameters()))


def is_flattened(tensor: Tensor) -> bool:
    """Whether it is a part of one of FSDP1's flat parameters, of whatever shape between calls."""
    return getattr(tensor, "_fsdp_flattened", False)


def writes_files() -> bool:
    """Whether this rank writes what all ranks have gathered: the first one does."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
