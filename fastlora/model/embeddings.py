"""A transformers model's embeddings in an adapter's files: PEFT saves them if they were resized."""

import warnings
from collections.abc import Collection

from torch import Tensor, nn

from ..layers.modules import plain_name
from ..projection import shown

AUTO = "auto"


def embeddings_of(
    model: nn.Module, saved: Collection[str], layers: Collection[str]
) -> dict[str, Tensor]:
    """What the input and output embeddings hold, under PEFT's keys without their prefix.

    Not those inside of ``saved``, modules that train in full.  An output head that is among the
    adapted ``layers`` has its weight under ``base_layer``.
    """
    tensors = {}
    for module in _embeddings(model):
        names = [name for name, other in model.named_modules() if other is module]
        name = plain_name(names[0]) if names else None
        if name is None or any(name == one or name.startswith(f"{one}.") for one in saved):
            continue
        prefix = f"{name}.base_layer" if name in layers else name
        for key, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and key not in ("lora_A", "lora_B"):
                tensors[f"{prefix}.{key}"] = tensor
    return tensors


def must_save_embeddings(model: nn.Module, choice: bool | str) -> bool:
    """Whether ``save_embedding_layers`` means so; "auto" compares with the base model's config."""
    if isinstance(choice, bool):
        return choice
    if not isinstance(choice, str) or choice != AUTO:
        raise ValueError(
            f"save_embedding_layers is {shown(choice)}, but must be True, False or 'auto'"
        )
    return _was_resized(model)


def _was_resized(model: nn.Module) -> bool:
    """Whether the vocabulary has another size than in the config that the model came with."""
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
    return _vocabulary(config) != _vocabulary(base)


def _vocabulary(config) -> int | None:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "vocab_size", None)


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings of a transformers model."""
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, method, lambda: None)()
        except NotImplementedError:
            continue
        if isinstance(module, nn.Module):
            found.append(module)
    return found
