"""Names what doesn't learn: adapters without gradients, doubtful settings, new embeddings."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..common.values import doubt_of
from ..layers.modules import embeddings_of, has_sharded, plain_name, some, unwrap
from .targets import peft_layers

# A step may have no gradients at all: of a GRPO batch with equal rewards, or after an overflow.
_STEPS = 10
# Model -> the number of steps that are still looked at, and the function that gets the text.
_watched: WeakKeyDictionary[nn.Module, tuple[int, Callable[[str], None]]] = WeakKeyDictionary()
_untrained: WeakSet[nn.Module] = WeakSet()  # layers whose adapters had no gradient
_hooks: list[Any] = []  # the handle of the hook on all optimizers


def watch(model: nn.Module, say: Callable[[str], None]) -> None:
    """Call ``say`` with the names of adapters that have no gradient in the first step.

    A hook before every optimizer's step looks at the gradients, until one adapter of the model has
    a gradient.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))
    _watched[unwrap(model)] = _STEPS, say


def untrained_note(layers: Iterable[tuple[str, Any]]) -> str:
    """A note on layers whose adapters had no gradient in the first step; "" without any."""
    names = [name for name, layer in layers if layer in _untrained]
    if not names:
        return ""
    return (
        f"adapters without a gradient in the first step: {some(names)}: the loss of this batch "
        "doesn't depend on these layers, or they were called without gradients"
    )


def doubts(model: Any, layers: Iterable[tuple[str, Any]]) -> list[str]:
    """Notes on settings that PEFT accepts in silence, although they can't be meant."""
    names: dict[str, list[str]] = {}
    for name, layer in layers:
        sizes: tuple[float, ...] = (layer.out_features, layer.in_features)
        if not all(sizes) or hasattr(layer.get_base_layer(), "kernel_size"):
            sizes = (math.inf,)  # a custom layer has None; a convolution has a larger rank
        for adapter in layer.active_adapters:
            scaling, r = layer.scaling.get(adapter, 1.0), layer.r.get(adapter, 0)
            if doubt := doubt_of(scaling, r, sizes):
                names.setdefault(doubt, []).append(name)
    notes = [f"{some(found)}: {doubt}" for doubt, found in names.items()]
    for adapter, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "lora_dropout", 0.0) < 0.0:
            notes.append(
                f"lora_dropout of {adapter} is {config.lora_dropout}, which PEFT takes for 0: give "
                "a probability in [0, 1)"
            )
    return notes


def _look(*_: Any) -> None:
    """The hook: judge each watched model that has gradients now."""
    if torch.compiler.is_compiling():
        return
    for model, (steps, say) in [*_watched.items()]:
        del _watched[model]
        if has_sharded(model):  # a shard of zeros says nothing about the others
            continue
        layers = peft_layers(model)
        learns = {layer: found for _, layer in layers if (found := [*_gradients(layer)])}
        if any(map(any, learns.values())):
            _untrained.update(layer for layer, found in learns.items() if not any(found))
            if note := untrained_note(layers):
                say(note)
        elif steps > 1:
            _watched[model] = steps - 1, say


def _gradients(layer: Any) -> Iterator[bool]:
    """For each active adapter that trains: whether its lora_B has a gradient other than zero.

    lora_A of a new adapter has a gradient of zero, because lora_B is zero.
    """
    weights: dict[str, Any] = dict(layer.lora_embedding_B.items())
    weights |= {name: getattr(lora_b, "weight", None) for name, lora_b in layer.lora_B.items()}
    for name in layer.active_adapters:
        if getattr(weights.get(name), "requires_grad", False):
            gradient = weights[name].grad
            yield gradient is not None and bool(gradient.any())


def embedding_notes(model: nn.Module) -> list[str]:
    """Warnings on the embeddings of a PEFT model of transformers that is about to be saved."""
    inner: Any = unwrap(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    ends = {which: embeddings_of(base, which) for which in ("input", "output")}
    config: Any = getattr(base, "config", None)
    if ends["input"] is None or not hasattr(config, "get_text_config"):
        return []
    trained = {
        which: {id(p) for p in module.parameters() if p.requires_grad} if module else set()
        for which, module in ends.items()
    }
    notes, text = [], config.get_text_config()
    tied = ends["output"] and getattr(text, "tie_word_embeddings", False)
    if tied and trained["input"] != trained["output"]:
        names = {module: plain_name(name) for name, module in base.named_modules()}
        name, other = (names[ends[which]] for which in ends)
        notes.append(
            f"{name} and {other} share one weight (tie_word_embeddings), but train apart: a merge, "
            "and a server with one weight for both, give another model.  Train with "
            "LoraConfig(ensure_weight_tying=True), or untie them before training"
        )
    try:
        loaded = type(config).from_pretrained(base.name_or_path, local_files_only=True)
        resized = loaded.get_text_config().vocab_size != text.vocab_size
    except (AttributeError, OSError, ValueError):  # it was made from a config, or moved
        resized = False
    if resized and not trained["input"]:
        notes.append(
            "the vocabulary was resized, but the embeddings of new tokens don't train: name the "
            "tokens in LoraConfig(trainable_token_indices=[…])"
        )
    return notes
