"""Adapter files: PEFT's ``adapter_model.safetensors`` and ``adapter_config.json``."""

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..layers.frozen import is_conv1d, is_router
from ..layers.modules import (
    copy_whole,
    is_sharded,
    lora_layers,
    reshard,
    some,
    unwrap,
    whole_tensors,
)
from .adapter_config import from_peft, to_peft
from .config import LoRAConfig, is_all_linear, weight_of
from .files import CONFIG, WEIGHTS, check_files, check_folder, read_header, read_json, write_adapter
from .inject import (
    RECORD,
    check_injection,
    check_model,
    inject,
    injection_of,
    undo_injection,
    untie,
)
from .targets import expert_modules
from .tensors import (
    AUTO,
    adapter_tensors,
    check_layers,
    check_planned,
    embedding_tensors,
    experts_weights,
    must_save_embeddings,
    name_of,
    read_fitting,
)

_Number = TypeVar("_Number", int, float)
# In a model with experts, PEFT takes linear layers of these names for experts' weights.
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, *, save_embedding_layers: bool | str = AUTO
) -> None:
    """Write only the adapter, in PEFT's two files, which PEFT loads.

    The files hold lora_A, lora_B, the biases that train and the modules that train in full.  vLLM
    loads them if neither biases nor modules train, and ranks and alphas don't follow a pattern.
    ``save_embedding_layers`` adds a transformers model's embeddings, as in PEFT.  "auto" adds them
    if the vocabulary's size differs from the model's original config, or if load_adapter loaded
    embeddings.  Both files are written under temporary names and renamed when they are complete, so
    an interrupted call leaves each file either old or new.  Under FSDP every rank must call this,
    and the first rank writes.

    Raises ValueError if apply_lora or load_adapter gave the model no adapters, and TypeError if
    ``model`` is not a module or ``folder`` not a path.  Warns if PEFT can't express the adapter's
    dropout.
    """
    check_model(model)
    path = check_folder(folder)
    outer, model, injection = model, unwrap(model), injection_of(model)
    if injection is None:
        if hasattr(model, "peft_config"):
            raise ValueError("this is a PEFT model: save it with model.save_pretrained(folder)")
        raise ValueError("the model has no adapters to save: call fastlora.apply_lora first")
    check_injection(model, injection)
    config = spell_out(model, injection.config, injection.layers, experts_weights(model))
    tensors = adapter_tensors(model, injection)
    if must_save_embeddings(model, save_embedding_layers) or (
        save_embedding_layers == AUTO and injection.has_embeddings
    ):
        tensors |= embedding_tensors(model, injection.saved_modules, injection.layers)
    sharded = any(map(is_sharded, tensors.values()))
    tensors = whole_tensors(outer, tensors)
    # All ranks took part in gathering; only the first one writes.
    if sharded and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    *_, (_, last) = lora_layers(model)
    source = getattr(model, "name_or_path", None) or None  # a transformers model has one
    # fan_in_fan_out: with Conv1D and Linear layers in one model, PEFT saves the last layer's.
    settings = to_peft(config, source, fan_in_fan_out=is_conv1d(last.plain_class))
    # Cloned, because safetensors refuses two keys (of tied parameters) that share memory.
    how = torch.contiguous_format
    values = {key: each.detach().cpu().clone(memory_format=how) for key, each in tensors.items()}
    write_adapter(path, settings, values)


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Load an adapter that fastlora or PEFT saved, and return the same model.

    A model without adapters gets adapters first, according to the file's config; they are trainable
    and float32 beside 16-bit weights.  A model with adapters must have exactly the file's layers,
    ranks and alphas, and keeps its dropout.  Values are cast to the adapter's dtype.  Embeddings in
    the file (from a resized vocabulary) replace the model's, as in PEFT.  The base weight of an
    adapted output head is also replaced, with a warning if the values differ.  Also warns of NaN
    and infinity.

    Raises FileNotFoundError if the two files are missing; the message describes the folder.
    Raises TypeError if ``model`` is not a module or ``folder`` not a path.  Raises ValueError for a
    damaged file, a config of another PEFT method or with unsupported settings, missing or extra
    keys, other shapes, and a merged model.  After an error the model is unchanged.  Shapes are
    checked in the file's header before any memory is allocated.
    """
    check_model(model)
    path, outer, model = check_folder(folder), model, unwrap(model)
    if hasattr(model, "peft_config"):
        raise ValueError("this is a PEFT model: load the adapter with model.load_adapter")
    check_files(path)
    reshard(outer)
    config = from_peft(read_json(path / CONFIG), str(path / CONFIG))
    stored = read_header(path / WEIGHTS)
    injection = injection_of(model)
    fresh = injection is None
    if injection is None:
        check_planned(model, config, stored, path / WEIGHTS)  # shapes, before memory is allocated
        injection = inject(outer, config)
    else:
        check_injection(model, injection)
    try:
        check_layers(model, config)
        fitting = read_fitting(model, injection, stored, path / WEIGHTS)
        if fitting.untied and not (fresh and fitting.wanted.keys() >= set(fitting.untied)):
            raise ValueError(
                f"{path / WEIGHTS} has separate values for {some(fitting.untied)}, but the model "
                "shares these weights with other modules: untie them first"
            )
        brought = whole_tensors(outer, fitting.brought).items()
        changed = [k for k, one in brought if not torch.equal(one, fitting.tensors[k].to(one))]
        _warn(model, changed, fitting.tensors, path / WEIGHTS)
    except BaseException:
        if fresh:
            undo_injection(model)
        raise
    # Nothing below can fail.
    for key in fitting.untied:
        untie(model, name_of(key))
    with torch.no_grad():
        for key, parameter in (adapter_tensors(model, injection) | fitting.brought).items():
            copy_whole(fitting.tensors[key], parameter)
    if changed:
        model.__dict__[RECORD] = replace(injection, has_embeddings=True)
    return outer


def _warn(model: nn.Module, changed: list[str], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Warn of NaN, and of another base weight of an adapted layer.

    A resized vocabulary changes the head's base weight on purpose, so it causes no warning.
    """
    bases = [key for key in changed if ".base_layer." in key]
    if bases and not must_save_embeddings(model, AUTO):
        warnings.warn(
            f"{path} has {some(bases)} with other values than the model: check that this is the "
            "base model that the adapter was trained on. The file's values were loaded, as in PEFT",
            stacklevel=3,
        )
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    # isfinite isn't implemented for 8-bit floats.
    wide = {key: one.float() if one.itemsize == 1 else one for key, one in floating.items()}
    if bad := [key for key, tensor in wide.items() if not tensor.isfinite().all()]:
        warnings.warn(
            f"{path} has NaN or infinity in {some(bad)}, which was loaded unchanged: the adapter "
            "is broken",
            stacklevel=3,
        )


def spell_out(
    model: nn.Module, config: LoRAConfig, layers: Iterable[str], experts: Collection[str]
) -> LoRAConfig:
    """The same config with the layers' names in place of "all-linear" and the like.

    ``experts``: the names among ``layers`` that are weights of experts.

    When PEFT 0.20 or newer loads a config for a mixture of experts, it rewrites it: targets of
    certain names become experts' parameters, and regular expressions become lists of last parts.
    In such a model, layers of these names are written as ``target_parameters``, which PEFT doesn't
    rewrite.
    """
    # Whether PEFT may take the model for a mixture of experts.
    about = getattr(model, "config", None)
    rewritten = hasattr(about, "model_type") and (
        bool(expert_modules(model)) or any(getattr(about, name, None) for name in _EXPERT_COUNTS)
    )
    targets, dense = config.target_modules, [name for name in layers if name not in experts]
    as_weights = {
        name
        for name in dense
        if config.names_weight_of(name)
        or (rewritten and name.rpartition(".")[2] in _NAMES_OF_EXPERTS)
        or is_router(model.get_submodule(name))
    }
    chosen_here = targets is None or is_all_linear(targets)
    if not (as_weights or chosen_here or (rewritten and isinstance(targets, str))):
        return config
    modules, alpha = [name for name in dense if name not in as_weights], config.lora_alpha
    return replace(
        config,
        target_modules=short_targets(model, modules),
        target_parameters=sorted([*map(weight_of, as_weights), *experts]) or None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=_with_weights(config.rank_pattern, config.rank_of, config.r, as_weights),
        alpha_pattern=_with_weights(config.alpha_pattern, config.alpha_of, alpha, as_weights),
    )


def _with_weights(
    patterns: Mapping[str, _Number],
    value_of: Callable[[str], _Number],
    default: _Number,
    layers: Iterable[str],
) -> dict[str, _Number]:
    """The patterns, and one more for each layer's weight whose value isn't the default."""
    of_layers = {
        ".".join(map(re.escape, weight_of(name).split("."))): value_of(name)
        for name in sorted(layers)
        if value_of(name) != default
    }
    return {**patterns, **of_layers}


def short_targets(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The last parts of the layers' names; the whole names if a last part is ambiguous."""
    layers = set(layers)
    ends = {name.rpartition(".")[2] for name in layers}
    matches = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if matches == layers else layers)
