"""The base of PEFT's layers in 8 bits: ``optimize(model, base="int8")``.

The bases are converted in place: a layer's ``base_layer`` becomes an ``Int8Linear``.  This file
imports nothing of PEFT.
"""

import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats.packing import pack_weight, packing_error
from ..layers.classes import Fast
from ..layers.int8 import Int8Linear, dense_linear
from ..layers.members import is_hooked, plain_class_of, why_not_tensor
from ..layers.modules import is_sharded, some
from ..settings import is_number
from ..text import shown

_CONVERTED = "_fastlora_int8"  # the model's attribute with the record of its conversions
_KEPT = "_fastlora_int8"  # a merged layer's attribute with its base in 8 bits
_SLOW = "this CPU has neither VNNI nor AMX, so it is slower in 8 bits than in 16"


def check_base(base: Any, least: Any) -> None:
    """Raise ValueError unless these are arguments ``base`` and ``int8_from`` of optimize."""
    if base not in (None, "int8"):
        raise ValueError(f'base is {shown(base)}, but must be "int8", or None for no change')
    if not (is_number(least) and least >= 0):
        raise ValueError(f"int8_from is {shown(least)}, but must be a number of features")


class Converted(NamedTuple):
    """What :func:`int8_bases` found, for the report."""

    # By name: ‖rounded - weight‖ / ‖weight‖ of each layer in 8 bits.
    errors: dict[str, float]
    dense: dict[str, list[str]]  # names of the other layers, by reason
    is_slow: bool  # whether they are on a CPU that is slow in 8 bits

    @property
    def notes(self) -> list[str]:
        notes = [f"{len(n)} not in 8 bits: {some(n)}: {why}" for why, n in self.dense.items()]
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            notes.append(
                f"the weights of {len(self.errors)} layers are rounded to 8 bits, by up to "
                f"{self.errors[worst]:.2%} of their norm ({worst}); restore and merges give the "
                "rounded weights"
            )
        return notes + [_SLOW] * self.is_slow


_NONE = Converted({}, {}, False)


def converted(model: nn.Module) -> Converted:
    """The record of the model's conversions."""
    return model.__dict__.get(_CONVERTED, _NONE)


def int8_bases(
    model: nn.Module, layers: list[tuple[str, Any]], fast: Container[Any], least: int
) -> tuple[dict[Any, nn.Module], Converted]:
    """The base in 8 bits of each layer that can have one, and the new record.  Changes nothing.

    ``fast``: the layers whose class becomes fast.  ``least``: layers with fewer input or output
    features stay dense.
    """
    owners = Counter(_memory_of(p) for m in model.modules() for p in m.parameters(recurse=False))
    bases: dict[Any, nn.Module] = {}
    errors, dense = dict(converted(model).errors), dict[str, list[str]]()
    for name, layer in layers:
        base = layer.base_layer
        if isinstance(base, Int8Linear):
            continue
        is_fast = layer in fast or isinstance(layer, Fast)
        reason = _why_dense(layer, base, least) if is_fast else "PEFT's forward runs"
        if not reason and owners[_memory_of(base.weight)] > 1:
            reason = "its weight is tied to another module's"
        if not reason:
            try:
                weight = pack_weight(base.weight.detach(), "int8")
                errors[name] = packing_error(base.weight.detach(), weight)
                bases[layer] = Int8Linear(weight, base.bias).train(base.training)
            except ValueError as error:  # NaN or infinity
                reason = str(error)
        if reason:
            dense.setdefault(reason, []).append(name)
    on_cpu = any(base.codes.is_cpu for base in bases.values())
    found = Converted(errors, dense, on_cpu and not _has_int8_products())
    if found.is_slow:
        warnings.warn(_SLOW, stacklevel=4)
    if not errors:
        warnings.warn(f"base='int8' has no effect: {'; '.join(found.notes)}", stacklevel=4)
    return bases, found


def _memory_of(parameter: Tensor) -> int:
    # A meta tensor, which has no memory, counts for itself.
    return id(parameter) if parameter.is_meta else parameter.untyped_storage().data_ptr()


def _why_dense(layer: Any, base: Any, least: int) -> str:
    """Why a layer's base can't be converted to 8 bits; "" if it can."""
    if plain_class_of(base) is not nn.Linear:
        return f"its base is a {type(base).__name__}, no torch.nn.Linear"
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
    few = min(weight.shape) < least
    return f"fewer than {least} input or output features (int8_from)" if few else ""


def _has_int8_products() -> bool:
    """Whether this CPU has instructions for sums of products of 8-bit integers."""
    known = [getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("vnni", "amx_tile")]
    return any(ask() for ask in known)


def use_bases(model: nn.Module, bases: Mapping[Any, nn.Module], record: Converted) -> None:
    """Replace the base of each of these layers, and the model's record."""
    for layer, base in bases.items():
        layer.base_layer = base
    model.__dict__.pop(_CONVERTED, None)
    if record != _NONE:
        model.__dict__[_CONVERTED] = record


def give_back_dense(model: nn.Module, layers: list[tuple[str, Any]]) -> None:
    """Give each layer a dense base with the values of its 8-bit one."""
    for _, layer in layers:
        vars(layer).pop(_KEPT, None)
        if isinstance(layer.base_layer, Int8Linear):
            layer.base_layer = dense_linear(layer.base_layer)
    model.__dict__.pop(_CONVERTED, None)


@contextmanager
def using_bases(bases: Mapping[Any, nn.Module]) -> Iterator[None]:
    """Inside, each of these layers has this base."""
    before = {layer: layer.base_layer for layer in bases}
    try:
        for layer, base in bases.items():
            layer.base_layer = base
        yield
    finally:
        for layer, base in before.items():
            layer.base_layer = base


@contextmanager
def dense_base(layer: Any) -> Iterator[None]:
    """Inside, the layer's base isn't in 8 bits.  It stays dense if the layer is merged then."""
    base = layer.base_layer
    if isinstance(base, Int8Linear):
        layer.base_layer = dense_linear(base)
        vars(layer)[_KEPT] = base
    try:
        yield
    finally:
        if not layer.merged and _KEPT in vars(layer):
            layer.base_layer = vars(layer).pop(_KEPT).to(layer.base_layer.weight.device)
