"""The distinct kinds of base products in the calls of a model's LoRA layers."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.sizes import Sizes
from ..call.projection import Output
from ..layers.experts_module import experts_of_a_token
from ..layers.linear import LoRALinear
from ..layers.mlp import PARTS, GatedMLP
from ..layers.report import NO_LAYERS
from ..peft.optimized import checked
from ..peft.targets import peft_layers

# A module, its output (or the reason why it isn't fast), and its dropout probability.
_Layer = tuple[Any, Output[Tensor] | str, float]


def products_of(
    model: nn.Module, tokens: int, dtype: torch.dtype | None
) -> tuple[list[Sizes], list[str]]:
    """The products of a training step with so many tokens, and notes on layers without one.

    Raises ValueError for a model without LoRA layers.
    """
    inner = checked(model)
    layers: dict[nn.Module, Sizes] = {}
    experts: list[Sizes] = []  # not by module, because an experts module has two weights
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
    # A gated MLP's block computes gate and up in one call, with one dx.
    for block in [module for module in inner.modules() if isinstance(module, GatedMLP)]:
        gate, up = [getattr(block, name) for name in PARTS[:2]]
        if gate in layers and up in layers:
            g, u = layers[gate], layers[up]
            both = replace(g, outs=g.outs + u.outs, ranks=g.ranks + u.ranks)
            # One call needs equal fields, except for the outputs' sizes and the ranks.
            if replace(u, outs=g.outs, ranks=g.ranks) == g:
                layers[gate] = layers[up] = both
    backward = [replace(sizes, backward=True) for sizes in (*layers.values(), *experts)]
    notes = [f"{count} layers weren't measured: {reason}" for reason, count in reasons.items()]
    return distinct([*products, *backward]), notes


def distinct(products: Iterable[Sizes]) -> list[Sizes]:
    """The first product of each kind; kinds don't differ by the dropout's probability."""
    kinds: dict[Sizes, Sizes] = {}
    for sizes in products:
        kinds.setdefault(replace(sizes, dropout=float(sizes.dropout > 0)), sizes)
    return list(kinds.values())


def _own(model: nn.Module) -> Iterator[_Layer]:
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            output = "merged" if layer.merged else layer.read().outputs[0]
            yield layer, output, layer.lora_dropout


def _of_peft(model: nn.Module) -> Iterator[_Layer]:
    if layers := peft_layers(model):
        from ..peft.records import outputs_of  # imported late, because it imports PEFT

        yield from outputs_of(layers)


def _sizes(
    module: Any, output: Output[Tensor], p: float, tokens: int, dtype: torch.dtype | None
) -> Sizes | str:
    """The sizes of the layer's forward product, or the reason why there is none."""
    weight, adapters = output.base.weight, output.adapters
    if weight.dim() not in (2, 3):
        return "sharded"
    experts, (n, k), used = 0, weight.shape[-2:], 1
    if weight.dim() == 3:
        experts, used = weight.shape[0], experts_of_a_token(module)
        if not used:
            return "its config doesn't say how many experts each token uses"
    if isinstance(weight, Tensor):
        dtype = dtype or weight.dtype
    ranks = tuple([adapter.lora_a.shape[-2] for adapter in adapters])
    dtypes = (dtype or torch.bfloat16, adapters[0].lora_a.dtype)
    # Each token is a row of every expert that it uses.
    return Sizes(tokens * used, k, (n,), (ranks,), *dtypes, p, experts=experts)
