"""Adapter files: PEFT's ``adapter_model.safetensors`` and ``adapter_config.json``."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modules import called, lora_layers, some, unwrap
from .adapter_config import from_peft, spell_out, to_peft
from .arguments import check_folder, check_model
from .config import LoRAConfig
from .embeddings import AUTO, embedding_tensors, must_save_embeddings
from .files import (
    CONFIG,
    WEIGHTS,
    Stored,
    check_files,
    read_header,
    read_json,
    read_tensors,
    write_whole,
)
from .inject import (
    Injection,
    check_injection,
    inject_known,
    injection_of,
    known_targets,
    record_injection,
    trained_biases,
    undo_injection,
    untie,
)

_PREFIX = "base_model.model."
# With modules_to_save, PEFT writes its wrapper's two copies of biases (bias="all") and embeddings.
_PEFT_COPIES = re.compile(r"\.(modules_to_save|original_module)\.([^.]*bias|weight)$")


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, *, save_embedding_layers: bool | str = AUTO
) -> None:
    """Write the adapter, and not the base model, as PEFT would; PEFT loads it.

    Besides lora_A and lora_B these are the biases that train and the modules that train in full;
    vLLM wants neither.  ``save_embedding_layers`` adds a transformers model's embeddings, as in
    PEFT: "auto" if its vocabulary was resized, which the config that it came with tells, or if
    load_adapter brought them.  Both files are written under temporary names first and renamed when
    they are whole: each is the old one or the new one, whole, whenever the call is interrupted.

    Raises ValueError for a model that apply_lora or load_adapter gave no adapters, and TypeError
    for what is no model or no path.  Warns where PEFT can't have the adapter's dropout.
    """
    from safetensors.torch import save

    check_model(model)
    path = check_folder(folder)
    model, injection = unwrap(model), injection_of(model)
    if injection is None:
        if hasattr(model, "peft_config"):
            raise ValueError("this is a PEFT model, whose save_pretrained saves it")
        raise ValueError("fastlora.apply_lora or load_adapter gave this model no adapters to save")
    check_injection(model, injection)
    config = spell_out(model, injection.config, injection.layers)
    tensors = _adapter_tensors(model, injection)
    if must_save_embeddings(model, save_embedding_layers) or (
        save_embedding_layers == AUTO and injection.has_embeddings
    ):
        tensors |= _embedding_tensors(model, injection)
    settings = to_peft(config, _base_name(model))
    # Cloned, since the file format takes no two keys (of tied parameters) with one memory.
    values = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    write_whole(
        path,
        {
            WEIGHTS: save(values, metadata={"format": "pt"}),
            CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
        },
    )


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Load an adapter that fastlora or PEFT saved, and return the same model.

    A plain model is given adapters first, as the file's config says: they train, and are float32
    beside 16-bit weights.  A model with adapters must have just the file's layers, ranks and
    alphas, and keeps its own dropout.  Values are cast to the dtype that the adapter has.
    Embeddings in the file (of a resized vocabulary) replace the model's, as in PEFT; a base weight
    of an adapted output head does so too, with a warning if it is another one.

    Raises FileNotFoundError for a folder without the two files, which says what the folder is;
    TypeError for what is no model or no path; and ValueError for a damaged file, a config of
    another PEFT method or with settings that fastlora hasn't, keys that are missing, too many or of
    another shape, and a merged model.  The model is then as it was.  Shapes are read from the
    file's header, and nothing is allocated before they fit.
    """
    check_model(model)
    path, outer, model = check_folder(folder), model, unwrap(model)
    if hasattr(model, "peft_config"):
        raise ValueError("this is a PEFT model, whose load_adapter loads it")
    check_files(path)
    config = from_peft(read_json(path / CONFIG), str(path / CONFIG))
    stored = read_header(path / WEIGHTS)
    injection = injection_of(model)
    fresh = injection is None
    if injection is None:
        _check_planned(model, config, stored, path / WEIGHTS)
        injection = inject_known(model, config)
    else:
        check_injection(model, injection)
    try:
        _check_layers(model, config)
        found = _read_fitting(model, injection, stored, path / WEIGHTS)
        if found.untied and not (fresh and found.wanted.keys() >= set(found.untied)):
            raise ValueError(
                f"{path / WEIGHTS} gives {some(found.untied)} values of their own, but the model "
                "shares these weights with other modules: untie them first"
            )
        changed = [
            key for key, here in found.brought.items() if not _same(here, found.tensors[key])
        ]
        _warn_of_another_base(model, changed, path / WEIGHTS)
    except BaseException:
        if fresh:
            undo_injection(model)
        raise
    for key in found.untied:
        untie(model, key.removeprefix(_PREFIX))
    with torch.no_grad():
        for key, parameter in (_adapter_tensors(model, injection) | found.brought).items():
            parameter.copy_(found.tensors[key])
    if changed:
        record_injection(model, replace(injection, has_embeddings=True))
    return outer


class _Found(NamedTuple):
    """What a file has for a model, by key."""

    wanted: dict[str, Tensor]  # the model's tensors, of the adapter
    brought: dict[str, Tensor]  # the model's tensors, of embeddings that are in the file
    tensors: dict[str, Tensor]  # the file's, for both
    untied: list[str]  # those that share memory in the model, and differ in the file


def _read_fitting(
    model: nn.Module, injection: Injection, stored: Mapping[str, Stored], path: Path
) -> _Found:
    """The file's tensors; ValueError if they aren't the model's."""
    wanted = _adapter_tensors(model, injection)
    embeddings = _embedding_tensors(model, injection)
    brought = {
        key: tensor for key, tensor in embeddings.items() if key in stored and key not in wanted
    }
    here = wanted | brought
    _check_keys(here, stored, path)
    tensors = read_tensors(path, here)
    first: dict[int, str] = {}
    untied = [
        key
        for key, tensor in here.items()
        if not torch.equal(tensors[first.setdefault(id(tensor), key)], tensors[key])
    ]
    return _Found(wanted, brought, tensors, untied)


def _check_planned(
    model: nn.Module, config: LoRAConfig, stored: Mapping[str, Stored], path: Path
) -> None:
    """Raise ValueError unless the file has lora_A and lora_B as the config would make them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in known_targets(model, config).items():
        r = config.rank_of(name)
        shapes[_key(name, "lora_A.weight")] = (r, linear.in_features)
        shapes[_key(name, "lora_B.weight")] = (linear.out_features, r)
    extra = [key for key in stored if ".lora_" in key and key not in shapes]
    _check_stored(shapes, stored, path, extra)


def _key(module: str, parameter: str) -> str:
    return _PREFIX + (f"{module}.{parameter}" if module else parameter)


def _adapter_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    """Everything that belongs to the adapter, under PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        tensors[_key(name, "lora_A.weight")] = layer.lora_A
        tensors[_key(name, "lora_B.weight")] = layer.lora_B
    for name in trained_biases(model, injection.config.bias):
        owner, _, last = name.rpartition(".")
        key = _key(owner, "base_layer.bias") if owner in injection.layers else _key(owner, last)
        tensors[key] = model.get_parameter(name)
    for name in injection.saved_modules:
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            tensors[_key(name, key)] = tensor
    return tensors


def _embedding_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    found = embedding_tensors(model, injection.saved_modules)
    return {_PREFIX + key: tensor for key, tensor in found.items()}


def _check_layers(model: nn.Module, config: LoRAConfig) -> None:
    """Raise ValueError unless the model's adapters are those that the config speaks of."""
    for name, layer in lora_layers(model):
        here = (layer.r, layer.lora_alpha, layer.use_rslora)
        there = (config.rank_of(name), config.alpha_of(name), config.use_rslora)
        if here != there:
            raise ValueError(
                f"{called(name)} has (r, lora_alpha, use_rslora) = {here}, but the file has "
                f"{there}: call fastlora.remove_lora(model) first, load_adapter makes the file's"
            )
        if layer.merged:
            raise ValueError(
                f"{called(name)} is merged: call fastlora.unmerge_lora(model) before loading"
            )


def _check_keys(wanted: Mapping[str, Tensor], stored: Mapping[str, Stored], path: Path) -> None:
    """Raise ValueError unless the file has just the wanted keys, of the wanted kind."""
    extra = [key for key in stored if key not in wanted and not _PEFT_COPIES.search(key)]
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    _check_stored(shapes, stored, path, extra)
    for key, tensor in wanted.items():
        if stored[key].is_floating != tensor.is_floating_point():
            raise ValueError(
                f"{path} has {key} of {stored[key].dtype}, the model of {tensor.dtype}"
            )
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device: load the base model's weights first")


def _check_stored(
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    path: Path,
    extra: list[str],
) -> None:
    """Raise ValueError unless the file has these keys and shapes, and no extra ones."""
    missing = [key for key in wanted if key not in stored]
    if missing or extra:
        raise ValueError(
            f"{path} doesn't fit the model: missing {some(missing)}; not known {some(extra)}. "
            "Is it the model, and the target_modules, that the adapter was trained with?"
        )
    for key, shape in wanted.items():
        there = stored[key].shape
        if there != shape:
            of_tokens = any(word in key for word in ("head", "embed"))
            resized = of_tokens and len(there) > 1 and there[1:] == shape[1:]
            hint = f": call model.resize_token_embeddings({there[0]}) first" if resized else ""
            raise ValueError(f"{path} has {key} of shape {there}, but the model's is {shape}{hint}")


def _same(here: Tensor, there: Tensor) -> bool:
    return torch.equal(here, there.to(here))


def _warn_of_another_base(model: nn.Module, changed: list[str], path: Path) -> None:
    """Warn if the file changes the base weight of an adapted layer, and not for new tokens."""
    bases = [key for key in changed if ".base_layer." in key]
    if bases and not must_save_embeddings(model, AUTO):
        warnings.warn(
            f"{path} has {some(bases)} with other values than the model: is it the base model that "
            "the adapter was trained on? The file's values were loaded, as PEFT does",
            stacklevel=3,
        )


def _base_name(model: nn.Module) -> str | None:
    """Where a transformers model was loaded from."""
    return getattr(model, "name_or_path", None) or None
