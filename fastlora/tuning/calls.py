"""The base products that the calls of a model's LoRA layers have, each kind once."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.sizes import Sizes
from ..layers.expert_layer import ExpertsWeight
from ..layers.experts import experts_of_a_token
from ..layers.mlp import PARTS, GatedMLP
from ..layers.modules import lora_layers
from ..peft.optimize import checked, peft_layers
from ..projection import Base, Output
from ..report import NO_LAYERS

# A module, its output or why it has none that is fast, and the probability of its dropout.
_Layer = tuple[Any, Output[Tensor] | str, float]


def products_of(
    model: nn.Module, tokens: int, dtype: torch.dtype | None
) -> tuple[list[Sizes], list[str]]:
    """Those of a training step with so many tokens, and why some layers have none.

    Raises ValueError for a model without LoRA layers.
    """
    inner = checked(model)
    layers: dict[nn.Module, Sizes] = {}
    experts: list[Sizes] = []  # whose modules have two weights
    reasons: Counter[str] = Counter()
    for module, output, p in chain(_own(inner), _of_peft(inner)):
        sizes = output if isinstance(output, str) else _sizes(module, output, p, tokens, dtype)
        if isinstance(sizes, str):
            reasons[sizes] += 1
        elif sizes.experts:
            experts.append(sizes)
        else:
            layers[module] = sizes
    if not (layers or experts or reasons):
        raise ValueError(f"this {type(model).__name__} has {NO_LAYERS}")
    products = [*layers.values(), *experts]
    for block in [module for module in inner.modules() if isinstance(module, GatedMLP)]:
        gate, up = [getattr(block, name) for name in PARTS[:2]]
        if gate in layers and up in layers:
            one, other = layers[gate], layers[up]
            both = replace(one, outs=one.outs + other.outs, ranks=one.ranks + other.ranks)
            if replace(other, outs=one.outs, ranks=one.ranks) == one:
                layers[gate] = layers[up] = both  # their dx is one
    backward = [replace(each, backward=True) for each in (*layers.values(), *experts)]
    notes = [f"{count} layers weren't measured: {reason}" for reason, count in reasons.items()]
    return distinct([*products, *backward]), notes


def distinct(products: Iterable[Sizes]) -> list[Sizes]:
    """The first of each kind: how much is dropped makes none."""
    kinds: dict[Sizes, Sizes] = {}
    for each in products:
        kinds.setdefault(replace(each, dropout=float(each.dropout > 0)), each)
    return list(kinds.values())


def _own(model: nn.Module) -> Iterator[_Layer]:
    """Layers and experts' weights of fastlora's own."""
    for _, layer in lora_layers(model):
        module = layer.adapted_module
        output: Output[Tensor] | str = "merged"
        if not layer.merged:
            try:
                if isinstance(layer, ExpertsWeight):  # whose output isn't stacked
                    output = Output(Base(layer.weight), (layer.adapter(),))
                else:
                    output = layer.adapted_output()
            except ValueError as error:
                output = str(error)
        yield module, output, module.lora_dropout


def _of_peft(model: nn.Module) -> Iterator[_Layer]:
    layers = peft_layers(model)
    if layers:
        from ..peft.records import outputs_of  # here, since it imports PEFT

        yield from outputs_of(layers)


def _sizes(
    module: Any, output: Output[Tensor], p: float, tokens: int, dtype: torch.dtype | None
) -> Sizes | str:
    """Of the layer's forward; or why there are none."""
    weight, adapters = output.base.weight, output.adapters
    if weight.dim() not in (2, 3):
        return "sharded"
    experts, (n, k), used = 0, weight.shape[-2:], 1
    if weight.dim() == 3:
        experts, used = weight.shape[0], experts_of_a_token(module)
        if not used:
            return "its config doesn't say how many experts a token goes to"
    if isinstance(weight, Tensor):
        dtype = dtype or weight.dtype
    ranks = tuple([adapter.lora_a.shape[-2] for adapter in adapters])
    dtypes = (dtype or torch.bfloat16, adapters[0].lora_a.dtype)
    return Sizes(tokens * used, k, (n,), (ranks,), *dtypes, p, experts=experts)
