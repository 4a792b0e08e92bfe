"""Walks a model: its LoRA layers, the wrappers around and inside of it, and sharded tensors."""

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from typing import Any, cast

from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..foreign import FSDP, FULLY_SHARDED, derived_from, is_dtensor
from .adapted import Adapted
from .adapted_weight import UNLOADED, AdaptedWeight

_PARALLEL = (DataParallel, DistributedDataParallel)
# Parts of names that wrappers inside of a model add: torch.compile, checkpointing, FSDP1.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def lora_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedWeight]]:
    """Every weight of the model that has an adapter, with its name: layers and experts' weights."""
    for name, module in model.named_modules():
        for weight_name, layer in module.adapted_weights() if isinstance(module, Adapted) else ():
            yield plain_name(".".join(filter(None, (name, weight_name)))), layer


def plain_name(name: str) -> str:
    """The name without the parts that wrappers add, as in a state dict.

    ``get_submodule`` accepts this name also.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def full_name(outer: str, last: str) -> str:
    """Join a module's name and a child's; the model itself has an empty name."""
    return f"{outer}.{last}" if outer else last


def unwrap(model: nn.Module) -> nn.Module:
    """The model that apply_lora was called on, inside ``torch.compile``, DDP, FSDP and the like."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile's
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, _PARALLEL) or derived_from(type(model), *FSDP):
            model = cast(nn.Module, model.module)
        else:
            return model


def inside_of(model: nn.Module, *kinds: tuple[str, str]) -> set[nn.Module]:
    """The modules inside of wrappers of these kinds, such as FSDP's.

    These wrappers ignore parameters that are added after wrapping.
    """
    outer = (m for m in model.modules() if any(derived_from(type(m), *kind) for kind in kinds))
    return {inner for module in outer for inner in module.modules()}


def owners_of(model: nn.Module, inside: Set[nn.Module] = frozenset()) -> Counter[int]:
    """How many modules outside of ``inside`` own each parameter, by its id.

    A tied parameter has several owners.
    """
    others = [module for module in model.modules() if module not in inside]
    return Counter(id(each) for module in others for each in module.parameters(recurse=False))


def left_out(model: nn.Module) -> list[str]:
    """The names of training parameters whose gradients aren't averaged over ranks.

    FSDP, DDP and ZeRO-3 average only the gradients of parameters that they found when they wrapped
    the model.  Parameters that a wrapper was told to ignore aren't listed, nor are parameters with
    a hook on their gradient, because their owner handles both on purpose.
    """
    cared: set[int] = set()  # ids of parameters that a wrapper averages or was told to ignore
    over_ranks = False
    for module in cast(Iterator[Any], model.modules()):
        if isinstance(module, DistributedDataParallel):
            over_ranks |= module.process_group.size() > 1
            ignored, inside = module.parameters_to_ignore, module.module.named_parameters()
            cared |= {id(p) for p in module._module_parameters}
            cared |= {id(p) for name, p in inside if name in ignored}
        elif derived_from(type(module), *FSDP):
            over_ranks |= module.process_group.size() > 1
            cared |= set(map(id, module._ignored_params))
        elif derived_from(type(module), *FULLY_SHARDED):
            for part in parts_of_fsdp(module):
                over_ranks |= part.sharded_param.device_mesh.size() > 1
                cared.add(id(getattr(part, "_unsharded_param", None)))  # may remain after a call
    named = list(unwrap(model).named_parameters())
    if any(hasattr(p, "ds_id") for _, p in named):
        over_ranks |= distributed.is_initialized() and distributed.get_world_size() > 1
    return [
        plain_name(name)
        for name, p in named
        if over_ranks and p.requires_grad and not (is_sharded(p) or hasattr(p, "ds_id"))
        if not (id(p) in cared or p._backward_hooks or p._post_accumulate_grad_hooks)
    ]


def parts_of_fsdp(module: Any) -> list[Any]:
    """FSDP2's record of each parameter that it shards with this module."""
    try:
        state = module._get_fsdp_state()
    except AssertionError:  # only the class is FSDP2's: a copy, or a module without parameters
        return []
    if hasattr(state, "_fsdp_param_groups"):
        groups = state._fsdp_param_groups
    else:  # before torch 2.12
        groups = [state._fsdp_param_group]
    return [part for group in groups if group is not None for part in group.fsdp_params]


def embeddings_of(model: nn.Module, which: str) -> nn.Module | None:
    """The "input" or "output" embeddings of a transformers model; None if it has none."""
    try:
        embedding = getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def some(names: Sequence[str]) -> str:
    """The first three names and the number of others, as text of a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    few = (name if len(name) < 200 else f"{name[:200]}…" for name in names[:3])
    return ", ".join(few) + more if names else "none"


def called(name: str) -> str:
    """A module's name for a message: "the model" if it is empty."""
    return name or "the model"


def whole_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the same keys, with sharded ones gathered.

    ``model`` must be the outermost wrapper, and every rank must make this call.  Raises ValueError
    for tensors of DeepSpeed's ZeRO-3, and for tensors on the meta device.
    """
    for key, tensor in tensors.items():
        if getattr(tensor, "ds_shape", tensor.shape) != tensor.shape:  # ZeRO-3's are empty here
            raise ValueError(
                f"DeepSpeed ZeRO-3 has parts of {key} on all ranks: call this inside of "
                "deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )
    flat, state = [tensor for tensor in tensors.values() if is_flattened(tensor)], {}
    if flat:  # FSDP1's
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        # Without cpu_offload: under FSDP1 on a CPU, it ends the process in torch 2.13.
        options = StateDictOptions(
            full_state_dict=True, ignore_frozen_params=all(t.requires_grad for t in flat)
        )
        state = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    names = {id(p): plain_name(name) for name, p in unwrap(model).named_parameters()}
    whole = dict(tensors)
    for key, tensor in tensors.items():
        if is_flattened(tensor):
            whole[key] = state[names[id(tensor)]]
        elif is_dtensor(tensor):
            part: Any = tensor
            whole[key] = part.to(part.device_mesh.device_type).full_tensor()
        elif tensor.is_meta:
            whole[key] = _offloaded(unwrap(model), names.get(id(tensor), ""), key)
    return whole


def _offloaded(model: nn.Module, name: str, key: str) -> Tensor:
    """The values of a tensor that accelerate offloads between calls, from its hooks."""
    parts = name.split(".")
    for end in range(len(parts)):  # the hook may be on the tensor's module or on one around it
        hook: Any = model.get_submodule(".".join(parts[:end])).__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            value = (getattr(one, "weights_map", None) or {}).get(".".join(parts[end:]))
            if value is not None and not value.is_meta:
                return value
    raise ValueError(f"{key} is on the meta device, {UNLOADED}")


def copy_whole(value: Tensor, parameter: Tensor) -> None:
    """Copy a whole tensor into a parameter, which may be this rank's shard of it (FSDP2)."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        part: Any = parameter
        # src_data_rank=None: every rank has the whole tensor, so no rank broadcasts it.
        value = distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)
    parameter.copy_(value)


def reshard(model: nn.Module) -> None:
    """Make FSDP2 shard all parameters again: a call may have left some whole."""
    for module in model.modules():
        if derived_from(type(module), *FULLY_SHARDED):
            cast(Any, module).reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP shards this tensor, so that each rank has a part of it between calls."""
    return is_flattened(tensor) or is_dtensor(tensor)


def has_sharded(module: nn.Module) -> bool:
    """Whether FSDP shards any parameter of the module."""
    return any(map(is_sharded, module.parameters()))


def is_flattened(tensor: Tensor) -> bool:
    """Whether it is a part of a flat parameter of FSDP1; such a part has no fixed shape."""
    return getattr(tensor, "_fsdp_flattened", False)
