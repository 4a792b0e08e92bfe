"""The report on any model with LoRA layers, fastlora's or PEFT's."""

import sys
from typing import Any

from torch import nn

from ..layers.mlp import cover_blocks
from ..layers.modules import plain_name, unwrap
from ..report import Coverage, LayerCoverage, cover_frozen, cover_lora_linears
from .versions import untested, why_not_peft


def coverage(model: nn.Module) -> Coverage:
    """How every LoRA layer of the model, fastlora's or PEFT's, would run now; nothing is called.

    Raises TypeError for what is no module, ValueError if ``FASTLORA_BACKEND`` names no backend.
    """
    inner = checked(model)
    unreached = "not optimised yet: fastlora.optimize(model) does it"
    theirs = cover(inner, peft_layers(inner), unreached)
    layers = (*cover_lora_linears(inner), *theirs.layers)
    blocks = cover_blocks(inner, unreached)
    return Coverage(layers, theirs.notes, frozen_layers(inner), blocks)


def cover(model: nn.Module, layers: list[tuple[str, Any]], unreached: str) -> Coverage:
    """The report on PEFT layers; ``unreached`` is what stops one that isn't optimised, if any."""
    if not layers:
        return Coverage(())
    version = why_not_peft()
    if version:
        return Coverage(tuple(_left_alone(name, layer, version) for name, layer in layers))
    from .mixed import mixed_notes
    from .records import records, wrapping_notes

    said = (*filter(None, [untested()]), *wrapping_notes(layers), *mixed_notes(layers))
    return Coverage(records(model, layers, unreached), said)


def frozen_layers(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers without an adapter that are fast; those of bases are PEFT layers'."""
    return tuple(name for name in cover_frozen(model) if not name.endswith(".base_layer"))


def _left_alone(name: str, layer: Any, reason: str) -> LayerCoverage:
    """The record of a layer of a PEFT that isn't known: as little is read as can be."""
    shape = (getattr(layer, "out_features", 0), getattr(layer, "in_features", 0))
    return LayerCoverage(name, shape, 0, False, "eager", reason)


def peft_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every LoRA layer of PEFT's, with its name.  Where PEFT isn't imported, there are none."""
    lora = sys.modules.get("peft.tuners.lora")
    kind = getattr(lora, "LoraLayer", ())
    return [(plain_name(name), m) for name, m in model.named_modules() if isinstance(m, kind)]


def checked(model: nn.Module) -> nn.Module:
    """What is inside the wrappers of a model; a TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    return unwrap(model)
