"""A mixed batch: ``model(…, adapter_names=[…])``, a name a sample, in training too.

PEFT hands the names to every LoRA layer by hooks, which it removes when the call ends.  A layer
reads its adapters by name (:mod:`.reading`), and runs them all as one node.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..backends.products import are_wide
from ..layers.frozen import fits
from ..layers.modules import has_sharded, some
from ..ops import multi_lora_linear
from ..projection import Adapter, Base, is_plain
from ..quant import PackedLayer
from ..rows import AdapterMapping, Share
from .reading import read_adapter, read_base

_NONE = "__base__"  # PEFT's name for no adapter


_FEW = 64  # rows in all


class MixedReading(NamedTuple):
    """The layer with all adapters that a batch names; or ``reason``, why its call is PEFT's."""

    reason: str
    base: Base[Tensor] | None = None
    adapters: tuple[Adapter[Tensor], ...] = ()
    dropouts: tuple[float, ...] = ()  # of each
    packed: PackedLayer | None = None  # of a quantised base


def mixed_forward(layer: LoraLayer, x: Tensor, names: Sequence[str]) -> Tensor | None:
    """The output for x, whose samples have these adapters; None where the call is PEFT's.

    An adapter that this layer doesn't have is none, as in PEFT.
    """
    if layer.disable_adapters or layer.merged or not isinstance(names, list | tuple):
        return None
    if not isinstance(x, Tensor) or x.dim() < 2 or x.is_nested or len(x) != len(names):
        return None
    own = layer._modules["lora_A"]._modules
    # What a mode of torch's makes, such as fake tensors, isn't kept for calls without it.
    in_mode = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    find = _mapping if in_mode else _kept_mapping
    used, mapping = find(tuple(names), tuple(own))
    if _are_few(layer, x) and not in_mode:
        return _few_rows(layer, x, used, mapping.on(x.device).found(len(x)))
    reading = read_mixed(layer, used) if used else MixedReading("it is the base layer's call")
    if reading.base is None or not fits(x, reading.base.weight):
        return None
    weight, bias = reading.base
    lora_a, lora_b, scales = zip(*reading.adapters, strict=True)
    p = reading.dropouts

    def run(x: Tensor) -> Tensor:
        return multi_lora_linear(
            x, weight, lora_a, lora_b, mapping, bias=bias, scales=scales, dropout=p
        )

    return run(x) if reading.packed is None else reading.packed.call(x, run)


def _are_few(layer: LoraLayer, x: Tensor) -> bool:
    """Whether these are few rows in evaluation on a CPU, as in generation.

    To read n adapters costs more there than their products.  But a packed weight, or one whose 16
    bits the CPU multiplies slowly, the node multiplies faster.
    """
    if layer.training or not is_plain(x) or not x.is_cpu or x.numel() > _FEW * layer.in_features:
        return False
    weight = layer._modules["base_layer"]._parameters.get("weight")
    return is_plain(weight) and weight.dtype == x.dtype and not are_wide(x)


def _few_rows(
    layer: LoraLayer, x: Tensor, names: Sequence[str], shares: Sequence[Share]
) -> Tensor | None:
    """PEFT's loop, which calls all modules, with rows that were sorted once a batch."""
    if any([name in layer.lora_variant for name in names]):
        return None
    modules = layer._modules
    lora_a, lora_b, dropouts, y = (
        modules["lora_A"]._modules,
        modules["lora_B"]._modules,
        modules["lora_dropout"]._modules,
        modules["base_layer"](x),
    )
    for adapter, items, _ in shares:
        name, scale = names[adapter], layer.scaling[names[adapter]]
        own = x[items] if isinstance(items, slice) else x.index_select(0, items)
        own = own.to(lora_a[name].weight.dtype)
        change = lora_b[name](lora_a[name](dropouts[name](own)))
        if change.dtype != y.dtype or isinstance(scale, Tensor):
            change, scale = (change * scale).to(y.dtype), 1.0
        if isinstance(items, slice):
            y[items].add_(change, alpha=scale)
        else:
            y.index_add_(0, items, change, alpha=scale)
    return y


def read_mixed(layer: LoraLayer, names: Sequence[str]) -> MixedReading:
    """Read the layer for a batch that names these adapters, all of which it has."""
    reason, weight, bias, packed = read_base(layer._modules["base_layer"])
    if reason:
        return MixedReading(reason)
    adapters, dropouts = [], []
    for name in names:
        if layer.lora_variant and name in layer.lora_variant:
            return MixedReading(f"its adapter {name} is no plain LoRA (DoRA, …)")
        one = read_adapter(layer, name, weight)
        if one.adapter is None:
            return MixedReading(one.reason)
        if one.shift is not None:
            return MixedReading(f"its adapter {name} has a bias (lora_bias)")
        adapters.append(one.adapter)
        dropouts.append(one.p)
    return MixedReading("", Base(weight, bias), tuple(adapters), tuple(dropouts), packed)


def _mapping(
    names: tuple[str, ...], own: tuple[str, ...]
) -> tuple[tuple[str, ...], AdapterMapping]:
    """Which of a layer's adapters are named, and which sample is whose: the same for all layers.

    It depends on names alone, so that adapters may come and go.
    """
    known = set(own)
    used = tuple(dict.fromkeys(n for n in names if n != _NONE and n in known))
    numbers = {name: i for i, name in enumerate(used)}
    return used, AdapterMapping([numbers.get(name, -1) for name in names], max(1, len(used)))


_kept_mapping = lru_cache(maxsize=64)(_mapping)


def mixed_notes(layers: Sequence[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """On layers whose mixed batches stay PEFT's, where a model has several adapters."""
    reasons: dict[str, list[str]] = {}
    for name, layer in layers:
        if isinstance(layer, LoraLayer) and not has_sharded(layer):
            names = list(layer._modules["lora_A"]._modules)
            reason = read_mixed(layer, names).reason if len(names) > 1 else ""
            if reason:
                reasons.setdefault(reason, []).append(name)
    return tuple(
        f"mixed batches (adapter_names) stay PEFT's in {len(found)}: {some(found)}: {reason}"
        for reason, found in reasons.items()
    )
