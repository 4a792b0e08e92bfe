"""Adapter files: PEFT's ``adapter_model.safetensors`` and ``adapter_config.json``."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers.frozen import is_conv1d
from ..layers.modules import (
    copy_whole,
    is_sharded,
    lora_layers,
    reshard,
    some,
    unwrap,
    whole_tensors,
    writes_files,
)
from .adapter_config import from_peft, spell_out, to_peft
from .files import (
    CONFIG,
    WEIGHTS,
    check_files,
    check_folder,
    read_header,
    read_json,
    write_whole,
)
from .inject import (
    check_injection,
    check_model,
    inject_known,
    injection_of,
    record_injection,
    undo_injection,
    untie,
)
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


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, *, save_embedding_layers: bool | str = AUTO
) -> None:
    """Write the adapter, and not the base model, as PEFT would; PEFT loads it.

    Besides lora_A and lora_B these are the biases that train and the modules that train in full;
    vLLM wants neither, nor ranks and alphas by pattern.  ``save_embedding_layers`` adds a
    transformers model's embeddings, as in PEFT: "auto" if its vocabulary was resized, which the
    config that it came with tells, or if load_adapter brought them.  Both files are written under
    temporary names first and renamed when they are whole: each is the old one or the new one,
    whole, whenever the call is interrupted.  Under FSDP every rank must call it, and the first one
    writes.

    Raises ValueError for a model that apply_lora or load_adapter gave no adapters, and TypeError
    for what is no model or no path.  Warns where PEFT can't have the adapter's dropout.
    """
    from safetensors.torch import save

    check_model(model)
    path = check_folder(folder)
    outer, model, injection = model, unwrap(model), injection_of(model)
    if injection is None:
        if hasattr(model, "peft_config"):
            raise ValueError("this is a PEFT model, whose save_pretrained saves it")
        raise ValueError("fastlora.apply_lora or load_adapter gave this model no adapters to save")
    check_injection(model, injection)
    config = spell_out(model, injection.config, injection.layers, experts_weights(model))
    tensors = adapter_tensors(model, injection)
    if must_save_embeddings(model, save_embedding_layers) or (
        save_embedding_layers == AUTO and injection.has_embeddings
    ):
        tensors |= embedding_tensors(model, injection.saved_modules, injection.layers)
    sharded = any(map(is_sharded, tensors.values()))
    tensors = whole_tensors(outer, tensors)
    if sharded and not writes_files():
        return
    *_, (_, last) = lora_layers(model)
    # In a model of both kinds PEFT has what it found last.
    settings = to_peft(config, _base_name(model), fan_in_fan_out=is_conv1d(last.plain_class))
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
    of an adapted output head does so too, with a warning if it is another one.  Warns of NaN and
    infinity, too.

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
    reshard(outer)
    config = from_peft(read_json(path / CONFIG), str(path / CONFIG))
    stored = read_header(path / WEIGHTS)
    injection = injection_of(model)
    fresh = injection is None
    if injection is None:
        check_planned(model, config, stored, path / WEIGHTS)
        injection = inject_known(outer, config)
    else:
        check_injection(model, injection)
    try:
        check_layers(model, config)
        found = read_fitting(model, injection, stored, path / WEIGHTS)
        if found.untied and not (fresh and found.wanted.keys() >= set(found.untied)):
            raise ValueError(
                f"{path / WEIGHTS} gives {some(found.untied)} values of their own, but the model "
                "shares these weights with other modules: untie them first"
            )
        brought = whole_tensors(outer, found.brought).items()
        changed = [k for k, one in brought if not torch.equal(one, found.tensors[k].to(one))]
        _warn_of_another_base(model, changed, path / WEIGHTS)
        _warn_of_no_numbers(found.tensors, path / WEIGHTS)
    except BaseException:
        if fresh:
            undo_injection(model)
        raise
    for key in found.untied:
        untie(model, name_of(key))
    with torch.no_grad():
        for key, parameter in (adapter_tensors(model, injection) | found.brought).items():
            copy_whole(found.tensors[key], parameter)
    if changed:
        record_injection(model, replace(injection, has_embeddings=True))
    return outer


def _warn_of_another_base(model: nn.Module, changed: list[str], path: Path) -> None:
    """Warn if the file changes the base weight of an adapted layer, and not for new tokens."""
    bases = [key for key in changed if ".base_layer." in key]
    if bases and not must_save_embeddings(model, AUTO):
        warnings.warn(
            f"{path} has {some(bases)} with other values than the model: is it the base model that "
            "the adapter was trained on? The file's values were loaded, as PEFT does",
            stacklevel=3,
        )


def _warn_of_no_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    bad = [
        key
        for key, tensor in floating.items()
        if not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all()
    ]
    if bad:
        warnings.warn(
            f"{path} has NaN or infinity in {some(bad)}, which was loaded as it is: the adapter is "
            "broken",
            stacklevel=3,
        )


def _base_name(model: nn.Module) -> str | None:
    """Where a transformers model was loaded from."""
    return getattr(model, "name_or_path", None) or None
