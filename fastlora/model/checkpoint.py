"""Adapter files: PEFT's ``adapter_model.safetensors`` and ``adapter_config.json``."""

import json
import os
import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..gather import is_sharded, whole_tensors, writes_files
from .adapter_config import from_peft, short_targets, to_peft
from .config import LoRAConfig
from .inject import (
    Injection,
    called,
    check_injection,
    inject_known,
    injection_of,
    lora_layers,
    some,
    trained_biases,
    undo_injection,
    unwrap,
)
from .targets import ALL_LINEAR

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_PEFT_COPIES = re.compile(r"\.(modules_to_save|original_module)\.[^.]*bias$")


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapter, and not the base model, as PEFT would; PEFT loads it.

    Besides lora_A and lora_B these are the biases that train and the modules that train in full;
    vLLM wants neither.  Both files are written under temporary names first and renamed when they
    are whole: each is the old one or the new one, whole, whenever the call is interrupted.  Under
    FSDP every rank must call it, and the first one writes.  Raises ValueError for a model that
    apply_lora or load_adapter gave no adapters.
    """
    from safetensors.torch import save

    outer, model, injection = model, unwrap(model), injection_of(model)
    if injection is None:
        raise ValueError("fastlora.apply_lora or load_adapter gave this model no adapters to save")
    check_injection(model, injection)
    targets = injection.config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        targets = short_targets(model, injection.layers)
    config = to_peft(injection.config, targets, _base_name(model))
    tensors = _adapter_tensors(model, injection)
    sharded = any(map(is_sharded, tensors.values()))
    tensors = whole_tensors(outer, tensors)
    if sharded and not writes_files():
        return
    # Cloned, since the file format takes no two keys (of tied parameters) with one memory.
    values = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    _write_whole(
        Path(folder),
        {
            WEIGHTS: save(values, metadata={"format": "pt"}),
            CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        },
    )


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Load an adapter that fastlora or PEFT saved, and return the same model.

    A plain model is given adapters first, as the file's config says: they train, and are float32
    beside 16-bit weights.  A model with adapters must have just the file's layers, ranks and
    alphas, and keeps its own dropout.  Values are cast to the dtype that the adapter has.

    Raises FileNotFoundError for a folder without the two files and ValueError for a damaged file, a
    config of another PEFT method or with settings that fastlora hasn't, keys that are missing, too
    many or of another shape, and a merged model.  The model is then as it was.
    """
    folder, outer, model = Path(folder), model, unwrap(model)
    config, tensors = _read_config(folder / CONFIG), _read_tensors(folder / WEIGHTS)
    injection = injection_of(model)
    fresh = injection is None
    if injection is None:
        injection = inject_known(model, config)
    else:
        check_injection(model, injection)
    try:
        _check_layers(model, config)
        wanted = _adapter_tensors(model, injection)
        _check_tensors(wanted, tensors, folder / WEIGHTS)
    except BaseException:
        if fresh:
            undo_injection(model)
        raise
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])
    return outer


def _adapter_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    """Everything that belongs to the adapter, under PEFT's keys."""
    tensors = {}
    for name, layer in lora_layers(model):
        tensors[f"{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{name}.lora_B.weight"] = layer.lora_B
    for name in trained_biases(model, injection.config.bias):
        owner = name.rpartition(".")[0]
        key = f"{owner}.base_layer.bias" if owner in injection.layers else name
        tensors[key] = model.get_parameter(name)
    for name in injection.saved_modules:
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            tensors[f"{name}.{key}"] = tensor
    return {_PREFIX + key.removeprefix("."): tensor for key, tensor in tensors.items()}


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


def _check_tensors(wanted: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the file has just the wanted keys and shapes."""
    # With bias="all" and modules_to_save, PEFT also writes its wrapper's two copies of those
    # modules' biases.
    extra = [key for key in found if key not in wanted and not _PEFT_COPIES.search(key)]
    missing = [key for key in wanted if key not in found]
    if missing or extra:
        raise ValueError(
            f"{path} doesn't fit the model: missing {some(missing)}; not known {some(extra)}. "
            "Is it the model, and the target_modules, that the adapter was trained with?"
        )
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise ValueError(
                f"{path} has {key} of shape {tuple(found[key].shape)}, "
                f"but the model's is {tuple(tensor.shape)}"
            )
        if found[key].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{path} has {key} of {found[key].dtype}, the model of {tensor.dtype}")
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device: load the base model's weights first")


def _read_config(path: Path) -> LoRAConfig:
    _check_exists(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return from_peft(values, str(path))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_exists(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} doesn't exist: an adapter's folder holds {CONFIG} and {WEIGHTS}"
        )


def _write_whole(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files so that each is the old or the new one, whole, if the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fastlora-", dir=folder) as scratch:
        for name, content in files.items():
            with open(Path(scratch) / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(Path(scratch) / name, folder / name)


def _base_name(model: nn.Module) -> str | None:
    """Where a transformers model was loaded from."""
    return getattr(model, "name_or_path", None) or None
