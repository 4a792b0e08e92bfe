"""A hook on load_state_dict, so that no adapter is silently left out.

transformers saves some modules under other names (Mixtral's ``mlp`` as ``block_sparse_moe``), and
its Trainer passes such a file to load_state_dict without renaming.
"""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..foreign import derived_from
from ..formats import bitsandbytes
from ..layers.modules import lora_layers, plain_name, some


def watch_loading(model: nn.Module) -> RemovableHandle:
    """Register the hook on the model; the handle removes it."""
    return model.register_load_state_dict_pre_hook(_find_adapters)


def _find_adapters(
    model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any
) -> None:  # rest: local_metadata, strict, missing, unexpected, errors
    """Rename the tensors that transformers saved under other names, and warn of missing ones.

    Reports an error if the state dict has adapters, but under unknown names.
    """
    for module in model.modules():
        bitsandbytes.before_loading(module)
    tensors, ends = _trained(model)
    if not _absent(tensors, state, prefix):
        return
    # First rename: transformers' names become the model's.
    names, parts = _saved_names(model, tensors)
    for name, saved in names.items():
        if prefix + name not in state and saved not in tensors and prefix + saved in state:
            state[prefix + name] = state.pop(prefix + saved)
    absent = _absent(tensors, state, prefix)
    if not absent:
        return
    # Still missing: adapters under unknown names are an error, and no adapters a warning.
    here = [key for key in state if key.startswith(prefix) and key.rpartition(".")[2] in ends]
    foreign = [key for key in here if key.removeprefix(prefix) not in tensors]
    foreign += [prefix + part for part in parts if prefix + part in state]
    if foreign:
        *_, errors = rest
        errors.append(
            f"{some(absent)} are not in this state dict, which has {some(foreign)}: tensors that "
            "transformers saves in other shapes can't be loaded: use "
            "fastlora.trainer.AdapterTrainer, or save_adapter and load_adapter"
        )
        return
    lack = some(absent) if here else "all adapters of the model"
    warnings.warn(
        f"load_state_dict: {lack} are not in this state dict, and keep their values: check that "
        "it isn't a base model's, or only a part of a checkpoint",
        stacklevel=4,
    )


def _absent(tensors: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str) -> list[str]:
    """The names of tensors that are missing in the state dict under all of their names."""
    # By identity, because one name of a tied parameter is enough.
    there = {id(tensor) for name, tensor in tensors.items() if prefix + name in state}
    return [name for name, tensor in tensors.items() if id(tensor) not in there]


def _trained(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Adapters and all trainable parameters, by name; and the last parts of adapters' names."""
    adapted = [layer for _, layer in lora_layers(model)]
    adapters = {id(tensor) for layer in adapted for tensor in layer.adapter_pair}
    ends = {name for layer in adapted for name in layer.pair_names()}
    named = model.named_parameters(remove_duplicate=False)
    chosen = ((n, p) for n, p in named if p.requires_grad or id(p) in adapters)
    return {plain_name(name): parameter for name, parameter in chosen}, ends


def _saved_names(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], list[str]]:
    """The names under which transformers' save_pretrained writes these tensors.

    Also returns the names of tensors that it makes by splitting or joining these; renaming can't
    restore them.
    """
    loading = sys.modules.get("transformers.core_model_loading")
    if loading is None or not derived_from(type(model), "transformers", "PreTrainedModel"):
        return {}, []
    # Convert tensors on meta, and see by identity which were renamed and which were made new.
    blank = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    saved = loading.revert_weight_conversion(model, dict(blank))
    names, ours = {id(one): name for name, one in saved.items()}, set(map(id, blank.values()))
    parts = [name for name, one in saved.items() if id(one) not in ours]
    return {name: names[id(one)] for name, one in blank.items() if id(one) in names}, parts
