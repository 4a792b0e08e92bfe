"""Base layers of PEFT's layers in 8 bits: ``optimize(model, base="int8")``.

The conversion is in place: a layer's ``base_layer`` becomes an ``Int8Linear``.  This file doesn't
import PEFT.
"""

import warnings
from collections.abc import Container
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..call.projection import HALF_DTYPES
from ..layers.classes import Fast
from ..layers.int8 import Int8Linear, dense_linear, int8_linear
from ..layers.module_parts import is_hooked, plain_class_of, why_not_tensor
from ..layers.modules import is_sharded, owners_of, some
from .dense import forget_packed

# An attribute of converted models: a dict from the name of each layer that stayed dense to the
# reason.
_REASONS = "_fastlora_int8_reasons"
_NO_VNNI = "this CPU has no VNNI, so products in 8 bits are slower than others"
# A LoRA layer with 512 rows and a 2048 x 2048 weight takes 2.3 × the frozen layer's time in 8 bits,
# and 1.4 × in bfloat16 (torch 2.13).
_AMX = "this CPU multiplies 16 bits by AMX, faster than torch multiplies and rounds to 8 bits"
Layers = list[tuple[str, Any]]


def convert(
    model: nn.Module, layers: Layers, fast: Container[Any], least: int, undo: ExitStack
) -> None:
    """Convert the base of each supported layer to 8 bits; closing ``undo`` restores the old bases.

    ``fast``: the layers whose class becomes fast.  ``least``: layers with fewer input or output
    features stay dense.
    """
    owners = owners_of(model)
    bases: dict[Any, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, layer in layers:
        base = layer.base_layer
        if isinstance(base, Int8Linear):
            continue
        reason = "PEFT's forward runs"
        if layer in fast or isinstance(layer, Fast):
            reason = _why_dense(layer, base, least)
        if not reason and owners[id(base.weight)] > 1:
            reason = "its weight is tied to another module's"
        if reason:
            reasons[name] = reason
        else:
            bases[layer] = int8_linear(base)
    home = vars(model)
    undo.callback(home.update, {_REASONS: home[_REASONS]} if _REASONS in home else {})
    undo.callback(home.pop, _REASONS, None)
    home[_REASONS] = reasons
    for layer, base in bases.items():
        undo.callback(setattr, layer, "base_layer", layer.base_layer)
        layer.base_layer = base
    notes_of(model, layers, warns=True)


def notes_of(model: nn.Module, layers: Layers, warns: bool = False) -> list[str]:
    """Notes for the report on a converted model.

    ``warns``: also warn if 8 bits are slow here, or if no layer was converted.
    """
    reasons = model.__dict__.get(_REASONS)
    if reasons is None:
        return []
    bases = [layer.base_layer for _, layer in layers if isinstance(layer.base_layer, Int8Linear)]
    dense: dict[str, list[str]] = {}
    for name, layer in layers:
        if not isinstance(layer.base_layer, Int8Linear):
            dense.setdefault(reasons.get(name, "it is merged, or was added later"), []).append(name)
    notes = [f"{len(n)} not in 8 bits: {some(n)}: {why}" for why, n in dense.items()]
    slow = next(filter(None, map(_why_slow, bases)), "")
    text = slow if bases else f"base='int8' has no effect: {'; '.join(notes)}"
    if warns and text:
        warnings.warn(text, stacklevel=5)
    if bases:
        lost = "restore and merges give the rounded weights"
        notes.append(f"the weights of {len(bases)} layers are rounded to 8 bits: {lost}")
    return notes + [slow] * bool(slow)


def _why_dense(layer: Any, base: Any, least: int) -> str:
    if plain_class_of(base) is not nn.Linear:
        return f"its base is a {type(base).__name__}, no torch.nn.Linear"
    if hasattr(layer, "parameter_name"):
        return "its adapter is added to the weight itself (target_parameters)"
    if layer.merged or is_hooked(base) or "forward" in vars(base):
        return "it is merged, or a hook acts on its base"
    if getattr(layer, "lora_variant", None):
        return "its adapter is a variant of LoRA (DoRA, …), which reads the weight"
    weight: Any = base.weight
    if reason := why_not_tensor(weight, 2):
        return f"its weight {reason}"
    if weight.is_meta or hasattr(weight, "ds_id") or is_sharded(weight):
        return "its weight is on meta or sharded: optimize before that"
    if weight.requires_grad:
        return "its weight trains"
    if min(weight.shape) < max(1, least):
        return f"fewer than {max(1, least)} input or output features (int8_from)"
    finite = bool(torch.linalg.vector_norm(weight.detach(), torch.inf).isfinite())
    return "" if finite else "its weight has infinities or NaN"


def _why_slow(base: Any) -> str:
    """Why this layer is slower in 8 bits than in its own dtype; "" if it isn't, or is on a GPU."""
    if not base.codes.is_cpu:
        return ""
    known = [getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("vnni", "amx_tile")]
    has_vnni, has_amx = (ask() for ask in known)
    if has_amx and base.format.dtype in HALF_DTYPES:
        return _AMX
    return "" if has_vnni or has_amx else _NO_VNNI


def give_back_dense(model: nn.Module, layers: Layers) -> None:
    """Replace each layer's 8-bit base by a dense base with the same values."""
    for _, layer in layers:
        forget_packed(layer)
        if isinstance(layer.base_layer, Int8Linear):
            layer.base_layer = dense_linear(layer.base_layer)
    vars(model).pop(_REASONS, None)
