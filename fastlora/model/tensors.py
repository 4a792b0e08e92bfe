"""An adapter's tensors under PEFT's keys, in a model and in a file."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.adapted_weight import UNLOADED
from ..layers.expert_layer import ExpertsWeight
from ..layers.modules import called, embeddings_of, full_name, lora_layers, plain_name, some
from ..text import shown
from .config import LoRAConfig, is_inside
from .files import PREFIX, Planned, name_of, read_tensors
from .targets import Targets, find_targets, modules_to_save, trained_biases

if TYPE_CHECKING:
    from .inject import Injection

AUTO = "auto"
# PEFT's wrapper of modules_to_save holds two copies of biases (bias="all") and embeddings.  PEFT
# writes both under these keys; they are ignored.
_PEFT_COPIES = re.compile(r"\.(modules_to_save|original_module)\.([^.]*bias|weight)$")


def _key(module: str, parameter: str) -> str:
    return PREFIX + full_name(module, parameter)


def adapter_tensors(model: nn.Module, injection: "Injection") -> dict[str, Tensor]:
    """All tensors of the adapter, under PEFT's keys."""
    adapted = dict(lora_layers(model))
    tensors: dict[str, Tensor] = {}
    for name, keys in pairs_of(adapted, experts_weights(model)).items():
        tensors |= dict(zip(keys, adapted[name].adapter_pair, strict=True))
    saved, layers = injection.saved_modules, injection.layers
    return tensors | full_tensors(model, injection.config.bias, saved, layers)


def full_tensors(
    model: nn.Module, bias: str, saved: Iterable[str], layers: Collection[str]
) -> dict[str, Tensor]:
    """The biases that train, and the tensors of modules that train in full, under PEFT's keys.

    ``layers``: the names of layers that have an adapter or will get one.
    """
    tensors: dict[str, Tensor] = {}
    for name in trained_biases(model, bias, layers):
        owner, _, last = name.rpartition(".")
        key = _key(owner, "base_layer.bias") if owner in layers else _key(owner, last)
        tensors[key] = model.get_parameter(name)
    for name in saved:
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            tensors[_key(name, key)] = tensor
    return tensors


def experts_weights(model: nn.Module) -> set[str]:
    """The names of the weights of experts that have adapters."""
    return {n for n, layer in lora_layers(model) if isinstance(layer, ExpertsWeight)}


def pairs_of(names: Iterable[str], experts: Collection[str]) -> dict[str, tuple[str, str]]:
    """The keys of lora_A and lora_B in a file, by the name of the layer or of the experts' weight.

    PEFT wraps an experts module once for each weight; the last weight's wrapper is the outermost.
    """
    by_module: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0] if name in experts else name
        by_module.setdefault(module, []).append(name)
    pairs = {}
    for module, weights in by_module.items():
        for outside, name in enumerate(reversed(weights)):  # wrappers around this weight's
            layer = ".".join(filter(None, (module, *["base_layer"] * outside)))
            pairs[name] = _key(layer, "lora_A.weight"), _key(layer, "lora_B.weight")
    return pairs


def embedding_tensors(
    model: nn.Module, saved: Collection[str], layers: Collection[str]
) -> dict[str, Tensor]:
    """The tensors of a transformers model's input and output embeddings, under PEFT's keys.

    Embeddings inside modules that train in full (``saved``) are left out.  The weight of an adapted
    output head (in ``layers``) is under ``base_layer``.
    """
    tensors = {}
    for module in (embeddings_of(model, which) for which in ("input", "output")):
        names = [name for name, other in model.named_modules() if other is module]
        name = plain_name(names[0]) if names else None
        if module is None or name is None or any(is_inside(name, outer) for outer in saved):
            continue
        prefix = f"{name}.base_layer" if name in layers else name
        for key, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and key not in ("lora_A", "lora_B"):
                tensors[_key(prefix, key)] = tensor
    return tensors


def must_save_embeddings(model: nn.Module, choice: bool | str) -> bool:
    """Whether to save embeddings, for this value of ``save_embedding_layers``.

    "auto" compares the vocabulary's size with the config that the model was loaded from.
    """
    if isinstance(choice, bool):
        return choice
    if not isinstance(choice, str) or choice != AUTO:
        raise ValueError(
            f"save_embedding_layers is {shown(choice)}, but must be True, False or 'auto'"
        )
    config, source = getattr(model, "config", None), getattr(model, "name_or_path", None)
    read = getattr(type(config), "from_pretrained", None)
    if not source or read is None:
        return False
    try:
        base = read(source, local_files_only=True)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"can't read the config in {source} ({type(error).__name__}): if the vocabulary was "
            "resized, call save_adapter with save_embedding_layers=True",
            stacklevel=4,
        )
        return False
    now, before = (getattr(text_config(each), "vocab_size", None) for each in (config, base))
    return now != before


def text_config(config: Any) -> Any:
    """The config of the language model in a model that may also have a vision model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class Found(NamedTuple):
    """The tensors that a file and a model have in common, by key."""

    wanted: dict[str, Tensor]  # the model's tensors of the adapter
    brought: dict[str, Tensor]  # the model's tensors of embeddings, if the file has them
    tensors: dict[str, Tensor]  # the file's tensors for both
    untied: list[str]  # keys of tensors that share memory in the model, but differ in the file


def read_fitting(
    model: nn.Module, injection: "Injection", stored: Mapping[str, Planned], path: Path
) -> Found:
    """Read the file's tensors.  Raises ValueError if they don't fit the model."""
    wanted = adapter_tensors(model, injection)
    embeddings = embedding_tensors(model, injection.saved_modules, injection.layers)
    brought = {k: each for k, each in embeddings.items() if k in stored and k not in wanted}
    here = wanted | brought
    # With bias="all", PEFT writes a bias of a block that is at two places under both names.
    named = dict(model.named_parameters(remove_duplicate=False))
    ours = set(map(id, here.values()))
    plain = {key: name_of(key).replace(".base_layer.", ".") for key in stored}
    stored = {k: v for k, v in stored.items() if k in here or id(named.get(plain[k])) not in ours}
    _check_keys(here, stored, path)
    tensors = read_tensors(path, here)
    # A tied tensor has several keys, and the file must have equal values under them.
    first: dict[int, str] = {}
    untied = [
        key
        for key, tensor in here.items()
        if not _same_bits(tensors[first.setdefault(id(tensor), key)], tensors[key])
    ]
    return Found(wanted, brought, tensors, untied)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any dtype have the same bits; equal NaNs count as equal."""
    return one is other or (
        one.dtype == other.dtype
        and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    )


def check_planned(
    model: nn.Module, config: LoRAConfig, stored: Mapping[str, Planned], path: Path
) -> None:
    """Raise ValueError unless the file has the lora_A and lora_B that its config implies here.

    It runs before adapters are made, so a file that doesn't fit costs no memory.
    """
    saved = modules_to_save(model, config, every_name=False)
    planned = planned_adapters(find_targets(model, config, saved, every_name=False), config)
    shapes = {key: shape for key, (shape, _) in planned.items()}
    extra = [key for key in stored if ".lora_" in key and key not in shapes]
    _check_stored(shapes, stored, path, extra)


def planned_adapters(targets: Targets, config: LoRAConfig) -> dict[str, Planned]:
    """Shape and dtype of every lora_A and lora_B that the config implies, under PEFT's keys."""
    experts = [name for name, target in targets.items() if target.parameter]
    planned: dict[str, Planned] = {}
    for name, keys in pairs_of(targets, experts).items():
        shapes = targets[name].features.shapes(config.rank_of(name))
        pair = [Planned(shape, targets[name].dtype()) for shape in shapes]
        planned |= dict(zip(keys, pair, strict=True))
    return planned


def check_layers(model: nn.Module, config: LoRAConfig) -> None:
    """Raise ValueError unless the model's adapters have the config's ranks and alphas."""
    for name, layer in lora_layers(model):
        here = (layer.r, layer.lora_alpha, layer.use_rslora)
        there = (config.rank_of(name), config.alpha_of(name), config.use_rslora)
        if here != there:
            raise ValueError(
                f"{called(name)} has (r, lora_alpha, use_rslora) = {here}, but the file has "
                f"{there}: call fastlora.remove_lora(model) first, and load_adapter makes adapters "
                "with the file's settings"
            )
        if layer.merged:
            raise ValueError(
                f"{called(name)} is merged: call fastlora.unmerge_lora(model) before loading"
            )


def _check_keys(wanted: Mapping[str, Tensor], stored: Mapping[str, Planned], path: Path) -> None:
    """Raise ValueError unless the file has exactly the wanted keys, shapes and kinds of dtypes."""
    extra = [key for key in stored if key not in wanted and not _PEFT_COPIES.search(key)]
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    _check_stored(shapes, stored, path, extra)
    for key, tensor in wanted.items():
        dtype = stored[key].dtype
        if tensor.is_floating_point() != getattr(dtype, "is_floating_point", False):
            raise ValueError(f"{path} has {key} of {dtype}, but the model's is {tensor.dtype}")
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device, {UNLOADED}")


def unfitting(path: Path, missing: Collection[str], extra: Collection[str]) -> str:
    """A message on a file without some of a model's tensors, and with some that it hasn't."""
    lacks, more = (some([*map(name_of, keys)]) if keys else "" for keys in (missing, extra))
    lacks = lacks and f"it lacks {lacks}, which the model has"
    more = more and f"it has {more}, which the model lacks"
    return f"{path} doesn't fit the model: {'; '.join(filter(None, (lacks, more)))}"


def _check_stored(
    wanted: Mapping[str, Sequence[int]], stored: Mapping[str, Planned], path: Path, extra: list[str]
) -> None:
    """Raise ValueError unless the file has the wanted keys and shapes, and ``extra`` is empty."""
    missing = [key for key in wanted if key not in stored]
    if missing or extra:
        hint = "Load it into the model, with the target_modules, that it was trained with."
        if not extra and all(key.endswith(".base_layer.bias") for key in missing):
            hint = "PEFT before 0.21 leaves trained biases (bias='lora_only') out of its files."
        if not any("lora_" in key for key in stored):
            hint = "The file has no lora_A and no lora_B: it holds no adapter."
        raise ValueError(f"{unfitting(path, missing, extra)}. {hint}")
    for key, shape in wanted.items():
        there = stored[key].shape
        if there != shape:
            of_tokens = any(word in key for word in ("head", "embed"))
            resized = of_tokens and len(there) > 1 and there[1:] == shape[1:]
            hint = f": call model.resize_token_embeddings({there[0]}) first" if resized else ""
            raise ValueError(f"{path} has {key} of shape {there}, but the model's is {shape}{hint}")
