"""The contestants of a case: the frozen layer, fastlora and PEFT, on the very same tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastlora

from .shapes import SAME_DTYPE, Case


@dataclass(frozen=True)
class Contestant:
    """``forward`` maps x to y or a tuple of them; ``adapter``: each projection's lora_A, lora_B."""

    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    adapter: tuple[nn.Parameter, ...]
    module: nn.Module

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        ys = self.forward(x)
        return (ys,) if isinstance(ys, Tensor) else ys


@dataclass(frozen=True)
class Contest:
    """The contestants in the order of a round, their input, and the gradients of their outputs."""

    x: Tensor
    dys: tuple[Tensor, ...]
    contestants: dict[str, Contestant]
    projections: list[fastlora.Projection]
    dropout: float


class Group(nn.Module):
    """Layers of one x, each called by itself: what a group is without fastlora."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class FusedGroup(Group):
    """LoRALinear layers of one x, called through :func:`fastlora.lora_linears`."""

    def __init__(self, layers: list[nn.Module], dropout: float) -> None:
        super().__init__(layers)
        self.dropout, self.projections = dropout, projections_of(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return fastlora.lora_linears(
            x, self.projections, dropout=self.dropout, training=self.training
        )


def make_contest(case: Case) -> Contest:
    torch.manual_seed(0)
    x = torch.randn(case.M, case.K).to(case.dtype).requires_grad_()
    dys = tuple(torch.randn(case.M, N).to(case.dtype) for N in case.outputs)
    theirs = peft_layers(case)
    ours = [_fastlora_layer(layer, case, case.adapter_dtype) for layer in theirs]
    contestants = {"frozen": _contestant([layer.base_layer for layer in theirs], Group)}
    if case.mixed:
        same = [_fastlora_layer(layer, case, case.dtype) for layer in theirs]
        contestants[SAME_DTYPE] = _contestant(same, lambda layers: FusedGroup(layers, case.dropout))
    contestants["fastlora"] = _contestant(ours, lambda layers: FusedGroup(layers, case.dropout))
    contestants["peft"] = _contestant(theirs, Group)
    return Contest(x, dys, contestants, projections_of(ours), case.dropout)


def projections_of(layers: list[nn.Module]) -> list[fastlora.Projection]:
    return [
        fastlora.Projection(layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling)
        for layer in layers
    ]


def _contestant(
    layers: list[nn.Module], as_group: Callable[[list[nn.Module]], nn.Module]
) -> Contestant:
    """One layer is called as it is; a group of them through ``as_group``."""
    module = layers[0] if len(layers) == 1 else as_group(layers)
    adapter = tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
    return Contestant(module, adapter, module)


def peft_layers(case: Case, kind: str = "lora") -> list[nn.Module]:
    """PEFT's own layers, in training mode: lora_B isn't zero, the scaling isn't one.

    ``kind`` is lora, dora (with a magnitude that isn't the norm), or two-adapters, both active.
    """
    import peft  # here: benchmarks/gpu runs where PEFT may be missing

    base = Group([nn.Linear(case.K, N, bias=False, dtype=case.dtype) for N in case.outputs])
    config = peft.LoraConfig(
        r=case.r,
        lora_alpha=2 * case.r,
        lora_dropout=case.dropout,
        target_modules=r"layers\.\d+",
        use_dora=kind == "dora",
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()
    if kind == "two-adapters":
        model.add_adapter("other", config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(["default", "other"])
    layers = list(model.base_model.model.layers)
    for layer in layers:
        _fill(layer, case)
    return layers


@torch.no_grad()
def _fill(layer: nn.Module, case: Case) -> None:
    for modules in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        modules.to(case.adapter_dtype)
    layer.base_layer.weight.normal_(std=case.K**-0.5)
    for name in layer.lora_A:
        layer.lora_A[name].weight.normal_(std=case.K**-0.5)
        layer.lora_B[name].weight.normal_(std=case.r**-0.5)
    for magnitude in layer.lora_magnitude_vector.values():
        magnitude.weight.mul_(1.0 + 0.1 * torch.rand_like(magnitude.weight))


def _fastlora_layer(
    theirs: nn.Module, case: Case, adapter_dtype: torch.dtype
) -> fastlora.LoRALinear:
    """A LoRALinear on a PEFT layer's very weight and adapter, or on a copy in another dtype."""
    layer = fastlora.LoRALinear.from_linear(
        theirs.base_layer, r=case.r, lora_alpha=2 * case.r, lora_dropout=case.dropout
    )
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    if adapter_dtype != case.adapter_dtype:
        down, up = (nn.Parameter(tensor.detach().to(adapter_dtype)) for tensor in (down, up))
    layer.lora_A, layer.lora_B = down, up
    return layer
