"""Walking a model: its LoRA layers, what is wrapped around it, and names for messages."""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..foreign import FSDP, derived_from
from .adapted import LoRALayer
from .expert_layer import LoRAExperts
from .expert_weight import ExpertsWeight

_PARALLEL = (DataParallel, DistributedDataParallel)
# What wrappers inside of a model add to names: torch.compile, checkpointing, FSDP1.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer | ExpertsWeight]]:
    """Everything of the model that has an adapter, with its name: layers, and experts' weights."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield plain_name(name), module
        elif isinstance(module, LoRAExperts):
            for weight in module.weights():
                yield plain_name(f"{name}.{weight.name}" if name else weight.name), weight


def plain_name(name: str) -> str:
    """The name without those of wrappers, as in a state dict; ``get_submodule`` knows it too."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


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
    """The modules inside of FSDP's and the like, which know the parameters that they found there.

    A parameter that comes later, or takes the place of another, is left out.
    """
    outer = (m for m in model.modules() if any(derived_from(type(m), *kind) for kind in kinds))
    return {inner for module in outer for inner in module.modules()}


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"


def called(name: str) -> str:
    """A module's name for a message; the model itself has none."""
    return name or "the model"
