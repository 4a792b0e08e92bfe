"""Walks a model: the wrappers around and inside of it, places of modules, and sharded tensors."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from typing import Any, cast

from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..common.other_packages import FSDP, FULLY_SHARDED, derived_from, is_dtensor

_PARALLEL = (DataParallel, DistributedDataParallel)
# Parts of names that wrappers inside of a model add: torch.compile, checkpointing, FSDP1.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def plain_name(name: str) -> str:
    """The name without the parts that wrappers add, as in a state dict.

    ``get_submodule`` accepts this name also.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def full_name(outer: str, last: str) -> str:
    """Join a module's name and a child's; the model itself has an empty name."""
    return f"{outer}.{last}" if outer else last


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DDP, FSDP and the like."""
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
    handled: set[int] = set()  # ids of parameters that a wrapper averages or was told to ignore
    over_ranks = False
    for module in cast(Iterator[Any], model.modules()):
        if isinstance(module, DistributedDataParallel):
            over_ranks |= module.process_group.size() > 1
            ignored, inside = module.parameters_to_ignore, module.module.named_parameters()
            handled |= {id(p) for p in module._module_parameters}
            handled |= {id(p) for name, p in inside if name in ignored}
        elif derived_from(type(module), *FSDP):
            over_ranks |= module.process_group.size() > 1
            handled |= set(map(id, module._ignored_params))
        elif derived_from(type(module), *FULLY_SHARDED):
            for part in parts_of_fsdp(module):
                over_ranks |= part.sharded_param.device_mesh.size() > 1
                handled.add(id(getattr(part, "_unsharded_param", None)))  # may remain after a call
    # ds_id: ZeRO-3 sets it on the parameters that it shards.
    named = list(unwrap(model).named_parameters())
    if any(hasattr(p, "ds_id") for _, p in named):
        over_ranks |= distributed.is_initialized() and distributed.get_world_size() > 1
    return [
        plain_name(name)
        for name, p in named
        if over_ranks and p.requires_grad and not (is_sharded(p) or hasattr(p, "ds_id"))
        if not (id(p) in handled or p._backward_hooks or p._post_accumulate_grad_hooks)
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


def bypassed(model: nn.Module) -> dict[str, str]:
    """Modules whose weights a fused torch.nn module reads without calling them, by name.

    The values are the class names of the fused modules.
    """
    return {
        full_name(outer, name): type(module).__name__
        for outer, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention)
        for name, _ in module.named_modules()
        if name
    }


def check_places(model: nn.Module, adapted: Iterable[nn.Module], saved: Collection[str]) -> None:
    """Raise ValueError if a module that is adapted or trains in full is at two places in the model.

    PEFT replaces the module only at the first place, and its files mean that.  A block around the
    module may be at several places, because PEFT's replacement is then at all of them.  ``saved``:
    names, as in :func:`find_targets`.
    """
    # All places of each module: its parents, and its full name under each.
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for outer, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, full_name(outer, key)))
    # A module in full counts with everything inside it; places within it are one place.
    whole = [model.get_submodule(name) for name in saved]
    groups = [(module, {module}) for module in adapted]
    for top, inside in [*groups, *((module, set(module.modules())) for module in whole)]:
        for module in inside:
            names = [name for parent, name in places.get(module, ()) if parent not in inside]
            # The top module has one place outside of itself; modules inside it must have none.
            if len(names) > (module is top) and any(True for _ in module.parameters()):
                first = next(name for name, found in model.named_modules() if found is module)
                others = ", ".join(name for name in names if name != first)
                raise ValueError(
                    f"{first.replace('.base_layer', '')} and {others} are one "
                    f"{type(module).__name__}, which PEFT would adapt "
                    f"or train only at the first place, and its files can't mean more. Put a copy "
                    f"(copy.deepcopy) at {others}, or leave the module out"
                )


REGEX_HINT = "a string is a regular expression for whole names: give a list of names instead"


def name_test(names: str | Iterable[str]) -> Callable[[str], bool]:
    """A predicate on names, as in PEFT's ``target_modules``.

    ``names``: a regular expression that must match the whole name, or a list of names or of their
    last parts.  Raises ValueError for an invalid expression.
    """
    if not isinstance(names, str):
        # Dots on both sides, so that "proj" matches "a.proj", but not "a.q_proj".
        ends = tuple(f".{name}" for name in names)
        return lambda name: f".{name}".endswith(ends)
    try:
        pattern = re.compile(names)
    except re.error as error:
        raise ValueError(
            f"{names!r} is no regular expression ({error}): give a list for plain names"
        ) from None
    return lambda name: pattern.fullmatch(name) is not None


def check_model(model: object) -> None:
    """Raise TypeError unless this is a module."""
    if not isinstance(model, nn.Module):
        name = type(model).__name__
        raise TypeError(f"model is a {name}, but must be a torch.nn.Module, such as trainer.model")


def check_plain(model: nn.Module) -> None:
    """Raise ValueError if a layer has an adapter, a LoRALinear's or PEFT's."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            raise ValueError(f"{called(name)} has an adapter already: unload it first")


def is_inside(name: str, outer: str) -> bool:
    """Whether a name is the module's or one inside it."""
    return name == outer or name.startswith(f"{outer}.")


def embeddings_of(model: nn.Module, which: str) -> nn.Module | None:
    """The "input" or "output" embeddings of a transformers model; None if it has none."""
    try:
        embedding = getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def text_config(config: Any) -> Any:
    """The config of the language model in a model that may also have a vision model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def some(names: Sequence[str]) -> str:
    """The first three names and the number of others, as text of a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    few = (name if len(name) < 200 else f"{name[:200]}…" for name in names[:3])
    return ", ".join(few) + more if names else "none"


def called(name: str) -> str:
    """A module's name for a message: "the model" if it is empty."""
    return name or "the model"


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP shards this tensor, so that each rank has a part of it between calls."""
    return is_flattened(tensor) or is_dtensor(tensor)


def has_sharded(module: nn.Module) -> bool:
    """Whether FSDP shards any parameter of the module."""
    return any(map(is_sharded, module.parameters()))


def is_flattened(tensor: Tensor) -> bool:
    """Whether it is a part of a flat parameter of FSDP1; such a part has no fixed shape."""
    return getattr(tensor, "_fsdp_flattened", False)
