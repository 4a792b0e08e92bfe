"""Contestants of layers: the frozen layer, fastlora's functions and modules, PEFT's, and others.

A maker builds a contestant on the tensors of a case, which all contestants share.  It uses only
public names of fastlora, so that another commit's fastlora also works (``compare.py``).
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastlora

from .cases import ADAPTERS, Case

SCALE = 2.0


@dataclass(frozen=True)
class Tensors:
    """The tensors of a case.  Adapters of all dtypes have equal values.

    For PEFT's layers with two adapters, the second half of the pairs is the second adapter.
    """

    x: Tensor
    dys: tuple[Tensor, ...]
    weights: tuple[nn.Parameter, ...]
    adapters: dict[torch.dtype, list[tuple[nn.Parameter, nn.Parameter]]]  # lora_a, lora_b
    # A block, which has no weights or adapters here; or a quantized layer with this weight.
    base: nn.Module | None = None


@dataclass(frozen=True)
class Contestant:
    """``module`` maps x to one y or several.

    ``own_mask``: its dropout mask is unknown, so it is compared with the formula without dropout.
    ``chosen`` is a context around forward and backward, which autograd's threads also follow.
    ``finish`` ends a step after them.  ``needs_dx``: x gets a gradient.
    """

    module: nn.Module
    own_mask: bool = False
    chosen: Callable[[], AbstractContextManager[None]] = nullcontext
    finish: Callable[[], None] = lambda: None
    needs_dx: bool = True

    @property
    def adapter(self) -> list[nn.Parameter]:
        """The trained parameters: lora_a, lora_b of one projection after the other."""
        return [each for each in self.module.parameters() if each.requires_grad]

    def leaves(self, x: Tensor) -> list[Tensor]:
        """The tensors that get a gradient."""
        return [x] * self.needs_dx + self.adapter


Maker = Callable[[Case, Tensors, float], Contestant]


class Group(nn.Module):
    """Layers of one x, called one by one, as a group is without fastlora."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class FusedGroup(Group):
    """LoRALinear layers of one x, called through :func:`fastlora.lora_linears`."""

    def __init__(self, layers: list[fastlora.LoRALinear]) -> None:
        super().__init__(layers)
        self.dropout = layers[0].lora_dropout
        self.projections = [
            fastlora.Projection(each.weight, each.lora_A, each.lora_B, None, SCALE)
            for each in layers
        ]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return fastlora.lora_linears(x, self.projections, dropout=self.dropout)


def frozen(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """``nn.Linear`` with no adapter: its forward and its dx."""
    return _contestant(linears(tensors.weights))


def merged(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """The adapter added to the weight once, for inference."""
    wholes = []
    for weight, (a, b) in zip(tensors.weights, tensors.adapters[torch.float32], strict=True):
        wholes.append(nn.Parameter((weight + SCALE * b @ a).to(case.dtype), requires_grad=False))
    return _contestant(linears(wholes))


def fastlora_layer(
    case: Case, tensors: Tensors, dropout: float,
    chosen: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Contestant:  # fmt: skip
    settings = {"r": case.r, "lora_alpha": SCALE * case.r, "lora_dropout": dropout}
    layers, pairs = [], tensors.adapters[case.adapter_dtype]
    for base, pair in zip(linears(tensors.weights), pairs, strict=True):
        layers.append(fastlora.LoRALinear.from_linear(base, **settings))
        layers[-1].lora_A, layers[-1].lora_B = pair
    return _contestant(layers, FusedGroup, chosen=chosen)


def peft_layer(
    case: Case, tensors: Tensors, dropout: float, optimized: bool = False, **options: object
) -> Contestant:
    """PEFT's layers, also after :func:`fastlora.optimize`, by default or with these options."""
    group = peft_group(case, tensors, dropout, optimized)
    if options:
        fastlora.optimize(group, strict=True, **options)
    return _contestant(list(group.layers), own_mask=True)


def _contestant(layers: list, as_group: type[Group] = Group, **more: object) -> Contestant:
    """A contestant of one layer, called directly, or of several, called through a group."""
    return Contestant(layers[0] if len(layers) == 1 else as_group(layers), **more)


def linears(weights: Sequence[nn.Parameter]) -> list[nn.Linear]:
    layers = [nn.Linear(*weight.shape[::-1], bias=False, device="meta") for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = weight
    return layers


def injected_layer(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """A layer after :func:`fastlora.get_peft_model`."""
    config = lora_config(case, dropout, target_modules=r"layers\.\d+")
    (layer,) = with_adapters(base_group(case, tensors), config).train().layers
    contestant = Contestant(layer)
    for own, shared in zip(
        contestant.adapter, tensors.adapters[case.adapter_dtype][0], strict=True
    ):
        own.data = shared.data
    return contestant


def lora_config(case: Case, dropout: float, **settings: Any) -> Any:
    import peft

    return peft.LoraConfig(r=case.r, lora_alpha=SCALE * case.r, lora_dropout=dropout, **settings)


def with_adapters(model: nn.Module, config: Any) -> nn.Module:
    """The model with fastlora's adapters, by the function that its version has for that."""
    if hasattr(fastlora, "get_peft_model"):
        return fastlora.get_peft_model(model, config).base_model.model
    names = "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters"
    settings = {name: getattr(config, name) for name in names}
    return fastlora.apply_lora(model, fastlora.LoRAConfig(**settings))


def base_group(case: Case, tensors: Tensors) -> Group:
    """The frozen layers: dense, or a copy of the quantized layer, marked as transformers does."""
    if tensors.base is None:
        return Group(linears(tensors.weights))
    group = Group([copy.deepcopy(tensors.base)])
    group.is_loaded_in_8bit, group.is_loaded_in_4bit = case.kind == "int8", case.kind == "nf4"
    return group


def peft_group(case: Case, tensors: Tensors, dropout: float, optimized: bool) -> Group:
    """PEFT's layers, in training mode, optionally optimized.

    DoRA's magnitude differs from the norm, because otherwise it would have no effect.
    """
    import peft

    names = [f"adapter{i}" for i in range(ADAPTERS if case.table == "mixed" else 1)]
    names += ["other"] * (case.kind == "two-adapters")
    targets = {"target_modules": r"layers\.\d+", "use_dora": case.kind == "dora"}
    config = lora_config(case, dropout, **targets)
    if case.table == "quantized":
        from transformers.integrations.gguf.utils import GgufLinear

        config._register_custom_module({GgufLinear: peft.tuners.lora.Linear})
    base = base_group(case, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config, names[0], autocast_adapter_dtype=False).train()
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(names)
    group, pairs = model.base_model.model, iter(tensors.adapters[case.adapter_dtype])
    for name in names:
        for layer in group.layers:
            layer.lora_A[name].weight, layer.lora_B[name].weight = next(pairs)
    for layer in group.layers if case.kind == "dora" else ():
        for magnitude in layer.lora_magnitude_vector.to(case.adapter_dtype).values():
            length = magnitude.weight.shape[-1]
            magnitude.weight.data *= torch.linspace(0.9, 1.1, length).to(magnitude.weight)
    if optimized:
        fastlora.optimize(group, strict=True)
    return group


class Mixed(nn.Module):
    """Calls ``run`` with x, split into a sequence for each adapter, and with these parameters."""

    def __init__(self, run: Callable[[Tensor], Tensor], case: Case, tensors: Tensors) -> None:
        super().__init__()
        self.run, (self.weight,) = run, tensors.weights
        pairs = tensors.adapters[case.adapter_dtype]
        self.adapters = nn.ParameterList([each for pair in pairs for each in pair])

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.view(ADAPTERS, -1, x.shape[-1])).flatten(0, 1)


def at_once(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """``multi_lora_linear``."""
    pairs, scales = tensors.adapters[case.adapter_dtype], [SCALE] * ADAPTERS
    lora_a, lora_b = map(list, zip(*pairs, strict=True))
    mapping = fastlora.AdapterMapping(list(range(ADAPTERS)), ADAPTERS)

    def run(x: Tensor) -> Tensor:
        operands = x, tensors.weights[0], lora_a, lora_b, mapping
        return fastlora.multi_lora_linear(*operands, scales=scales, dropout=dropout)

    return Contestant(Mixed(run, case, tensors))


def single_calls(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """A call of ``lora_linear`` for each adapter."""
    pairs = tensors.adapters[case.adapter_dtype]

    def run(x: Tensor) -> Tensor:
        ys = [
            fastlora.lora_linear(rows, tensors.weights[0], *pair, scale=SCALE, dropout=dropout)
            for rows, pair in zip(x.unbind(), pairs, strict=True)
        ]
        return torch.stack(ys)

    return Contestant(Mixed(run, case, tensors), own_mask=True)


def peft_batch(case: Case, tensors: Tensors, dropout: float, optimized: bool = False) -> Contestant:
    """PEFT's layer, called with ``adapter_names``; it loops over them.

    In training, PEFT's model refuses this call, but the layer accepts it.
    """
    (layer,) = peft_group(case, tensors, dropout, optimized).layers
    run = partial(layer, adapter_names=list(layer.lora_A))
    return Contestant(Mixed(run, case, tensors), own_mask=True)
