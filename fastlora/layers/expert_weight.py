"""One weight of an experts module with its adapter, which PEFT's files hold in two matrices."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.autocast import autocast_off
from ..projection import Adapter, Base, Output
from .adapted import check_adapter, initialise, scaling_of
from .base import tensor_of
from .experts import ADDED, is_reversed, stacked


class Features(NamedTuple):
    """A weight of experts as PEFT sees it: it has lora_A [E · r, p] and lora_B [q, r · E]."""

    experts: int
    p: int
    q: int
    is_transposed: bool  # what the module says, or False where it says nothing

    def shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of lora_A and lora_B; the expert is the slowest index of one, the fastest of the other"""
        return (self.experts * r, self.p), (self.q, r * self.experts)


def features_of(module: nn.Module, name: str) -> Features:
    """Of the weight of this name: [E, q, p], or [E, p, q] where the module says is_transposed."""
    is_transposed = bool(getattr(module, "is_transposed", False))
    experts, *sizes = tensor_of(module, name).shape
    p, q = sizes if is_transposed else sizes[::-1]
    return Features(experts, p, q, is_transposed)


@dataclass(frozen=True)
class Adaptation:
    """The numbers of one weight's adapter; r is that of each expert."""

    features: Features
    r: int
    lora_alpha: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        return scaling_of(self.lora_alpha, self.r, self.use_rslora)

    def stacked(self, lora_a: Tensor, lora_b: Tensor, transposed: bool) -> Adapter[Tensor]:
        """The two for ``ops.experts``; ``transposed``: the weight is [E, in, out]."""
        reverse = is_reversed(transposed, not self.features.is_transposed)
        return stacked(lora_a, lora_b, self.features.experts, self.scaling, reverse)


@dataclass(frozen=True)
class ExpertsWeight:
    """One adapted weight of an experts module, to those that walk a model's layers."""

    experts: Any
    name: str
    weight_name = "weight"

    @property
    def adaptation(self) -> Adaptation:
        return self.experts.adaptations[self.name]

    @property
    def weight(self) -> Tensor:
        return tensor_of(self.experts, self.name)

    @property
    def lora_a(self) -> Tensor:
        return tensor_of(self.experts, f"{self.name}{ADDED}A")

    @property
    def lora_b(self) -> Tensor:
        return tensor_of(self.experts, f"{self.name}{ADDED}B")

    @property
    def plain_class(self) -> type[nn.Module]:
        return self.experts.plain_class

    @property
    def features(self) -> Features:
        return self.adaptation.features

    @property
    def shape(self) -> tuple[int, int]:
        """PEFT's out_features and in_features."""
        return self.features.q, self.features.p

    @property
    def adapted_parameters(self) -> int:
        """How many parameters of the base the adapter changes, in all experts."""
        return math.prod(self.features[:3])

    @property
    def r(self) -> int:
        return self.adaptation.r

    @property
    def lora_alpha(self) -> float:
        return self.adaptation.lora_alpha

    @property
    def use_rslora(self) -> bool:
        return self.adaptation.use_rslora

    def output(self) -> Output[Tensor]:
        """The weight and its adapter as they are kept: not stacked, sharded under FSDP."""
        adapter = Adapter(self.lora_a, self.lora_b, self.adaptation.scaling)
        return Output(Base(self.weight, None), (adapter,))

    def check_weight(self, name: str) -> None:
        """Raise ValueError unless the weight is a parameter, which can be replaced."""
        if self.name not in self.experts._parameters:
            raise ValueError(
                f"{name} can't be merged or removed: it is computed (a parametrisation): make that "
                "permanent"
            )

    def check_adapter(self, name: str) -> None:
        """Raise ValueError unless lora_A and lora_B are what the weight can be added to."""
        labels, pair = [f"{self.name}{ADDED}{part}" for part in "AB"], (self.lora_a, self.lora_b)
        shaped = zip(pair, self.features.shapes(self.r), strict=True)
        check_adapter(name, self.weight.device, dict(zip(labels, shaped, strict=True)))

    def _factors(self) -> tuple[Tensor, Tensor, float]:
        """The two, for each expert, whose product is the adapter's part of its weight."""
        is_transposed = self.features.is_transposed
        thin, wide, scale = self.adaptation.stacked(self.lora_a, self.lora_b, is_transposed)
        return (thin.mT, wide.mT, scale) if is_transposed else (wide, thin, scale)

    def sum(self) -> Tensor:
        """weight + scaling · lora_B lora_A of every expert, which autograd follows."""
        left, right, scale = self._factors()
        weight = self.weight
        with autocast_off(weight.device.type):
            return torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=scale)

    def merged_weight(self) -> Tensor:
        """The sum in the weight's dtype, computed in float32 or wider, an expert at a time."""
        weight = self.weight
        merged = torch.empty_like(weight, requires_grad=False)
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad(), autocast_off(weight.device.type):
            left, right, scale = self._factors()
            for into, base, one, other in zip(merged, weight, left, right, strict=True):
                into.copy_(torch.addmm(base.to(wide), one.to(wide), other.to(wide), alpha=scale))
        return merged

    @property
    def merged(self) -> bool:
        return self.name in self.experts._base_weights

    @property
    def can_unmerge(self) -> bool:
        """Whether it is merged and its base was kept."""
        return self.experts._base_weights.get(self.name) is not None

    def use_merged(self, weight: Tensor, keep_base: bool = True) -> None:
        """Put the merged weight in the base's place, and keep that aside for :meth:`unmerge`."""
        base = self.experts._parameters[self.name]
        self.experts._base_weights[self.name] = base if keep_base else None
        setattr(self.experts, self.name, nn.Parameter(weight, requires_grad=False))

    def unmerge(self) -> None:
        """Put the original Parameter back: the same bits, and tied again if it was tied."""
        setattr(self.experts, self.name, self.experts._base_weights.pop(self.name))


def new_experts_adapter(
    module: nn.Module, name: str, r: int, init_lora_weights: bool | str, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    """Fresh lora_A [E · r, p] and lora_B [q, r · E] for the weight of this name."""
    device, shapes = tensor_of(module, name).device, features_of(module, name).shapes(r)
    lora_a, lora_b = (nn.Parameter(torch.empty(s, device=device, dtype=dtype)) for s in shapes)
    initialise(lora_a, lora_b, r, init_lora_weights)
    return lora_a, lora_b
