"""load_state_dict of a model with adapters: no adapter that it is about gets lost in silence.

transformers saves some modules under other names (Mixtral's ``mlp`` as ``block_sparse_moe``), and
its Trainer gives such a file to load_state_dict as it is.
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
    """Let each load_state_dict of the model find its adapters, until the handle is removed."""
    return model.register_load_state_dict_pre_hook(_find_adapters)


def _find_adapters(
    model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any
) -> None:  # rest: local_metadata, strict, missing, unexpected, errors
    """Give what transformers saved under other names the model's own; warn of what isn't there.

    An error if there are adapters, but under names that aren't known.
    """
    for module in model.modules():
        bitsandbytes.before_loading(module)
    tensors, ends = _trained(model)
    if not _absent(tensors, state, prefix):
        return
    names, parts = _saved_names(model, tensors)
    for name, saved in names.items():
        if prefix + name not in state and saved not in tensors and prefix + saved in state:
            state[prefix + name] = state.pop(prefix + saved)
    absent = _absent(tensors, state, prefix)
    if not absent:
        return
    here = [key for key in state if key.startswith(prefix) and key.rpartition(".")[2] in ends]
    foreign = [key for key in here if key.removeprefix(prefix) not in tensors]
    foreign += [prefix + part for part in parts if prefix + part in state]
    if foreign:
        *_, errors = rest
        errors.append(
            f"{some(absent)} are not in this state dict, which has {some(foreign)}: what "
            "transformers saves in other shapes doesn't come back: use "
            "fastlora.trainer.AdapterTrainer, or save_adapter and load_adapter"
        )
        return
    lack = some(absent) if here else "all adapters of the model"
    warnings.warn(
        f"load_state_dict: {lack} are not in this state dict, and keep their values: is it a base "
        "model's, or a part of a checkpoint?",
        stacklevel=4,
    )


def _absent(tensors: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str) -> list[str]:
    """The names of what the state dict has under none of its names."""
    there = {id(tensor) for name, tensor in tensors.items() if prefix + name in state}
    return [name for name, tensor in tensors.items() if id(tensor) not in there]


def _trained(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """What trains, and the adapters, by name; and the last parts of the adapters' names."""
    adapted = [layer for _, layer in lora_layers(model)]
    adapters = {id(tensor) for layer in adapted for tensor in layer.adapter_pair}
    ends = {name for layer in adapted for name in layer.pair_names()}
    named = model.named_parameters(remove_duplicate=False)
    chosen = ((n, p) for n, p in named if p.requires_grad or id(p) in adapters)
    return {plain_name(name): parameter for name, parameter in chosen}, ends


def _saved_names(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], list[str]]:
    """What transformers' save_pretrained calls each of these, and what it makes of others."""
    loading = sys.modules.get("transformers.core_model_loading")
    if loading is None or not derived_from(type(model), "transformers", "PreTrainedModel"):
        return {}, []
    blank = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    saved = loading.revert_weight_conversion(model, dict(blank))
    names, ours = {id(one): name for name, one in saved.items()}, set(map(id, blank.values()))
    parts = [name for name, one in saved.items() if id(one) not in ours]
    return {name: names[id(one)] for name, one in blank.items() if id(one) in names}, parts
