"""LoRAExperts: an experts module of a transformers model with adapters on its weights.

PEFT's files hold the adapter of a weight in two matrices, and so do these modules.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..foreign import is_class
from ..ops.autocast import autocast_off
from ..projection import Adapter, Base, Output
from .adapted import (
    Adapted,
    add_product,
    check_adapter,
    new_pair,
    refuse_training,
    scaling_of,
)
from .experts import ADDED, stacked
from .members import tensor_of, why_not_tensor
from .packed import (
    PackedExperts,
    dense_weight,
    needs_class,
    packed_names,
    read_module,
    settle,
    weight_in,
)

_ADDED = ("adaptations", "lora_dropout", "_bases")
_SWIZZLED = ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts")


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
    weight = weight_in(module, name)
    experts, *sizes = weight.shape
    # A packed one is [E, out, in] in any module.
    p, q = sizes if is_transposed and isinstance(weight, Tensor) else sizes[::-1]
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


@dataclass(frozen=True)
class ExpertsWeight(Adaptation):
    """One adapted weight of an experts module, to those that walk a model's layers."""

    experts: Any
    name: str
    weight_name = "weight"

    @property
    def weight(self) -> Any:
        """A tensor, or packed."""
        return weight_in(self.experts, self.name)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B."""
        lora_a, lora_b = names_of_pair(self.name)
        return tensor_of(self.experts, lora_a), tensor_of(self.experts, lora_b)

    def adapter(self) -> Adapter[Tensor]:
        """The two for ``ops.experts``: lora_a [E, r, in] and lora_b [E, out, r]."""
        return stacked(*self.pair, self.features.experts, self.scaling)

    @property
    def plain_class(self) -> type[nn.Module]:
        return self.experts.plain_class

    @property
    def shape(self) -> tuple[int, int]:
        """PEFT's out_features and in_features."""
        return self.features.q, self.features.p

    @property
    def adapted_parameters(self) -> int:
        """How many parameters of the base the adapter changes, in all experts."""
        return math.prod(self.features[:3])

    def output(self) -> Output[Tensor]:
        """The weight and its adapter as they are kept: not stacked, sharded under FSDP."""
        return Output(Base(self.weight, None), (Adapter(*self.pair, self.scaling),))

    def check_weight(self, name: str) -> None:
        """Raise ValueError unless the weight is a parameter, which can be replaced."""
        if self.name not in (*self.experts._parameters, *packed_names(self.experts)):
            raise ValueError(
                f"{name} can't be merged or removed: it is computed (a parametrisation): make that "
                "permanent"
            )

    def check_adapter(self, name: str) -> None:
        """Raise ValueError unless lora_A and lora_B are what the weight can be added to."""
        shaped = zip(self.pair, self.features.shapes(self.r), strict=True)
        labelled = dict(zip(names_of_pair(self.name), shaped, strict=True))
        check_adapter(name, self.weight.device, labelled)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The two, for each expert, whose product is the adapter's part of its weight."""
        lora_a, lora_b, _ = self.adapter()
        return (lora_a.mT, lora_b.mT) if self.features.is_transposed else (lora_b, lora_a)

    def sum(self, dtype: torch.dtype) -> Tensor:
        """weight + scaling · lora_B lora_A of every expert, which autograd follows.

        In the weight's dtype, or in this one if that is packed.
        """
        weight = self.weight
        if not isinstance(weight, Tensor):
            weight = dense_weight(self.experts, self.name, dtype)
        left, right = (factor.to(weight.dtype) for factor in self._factors())
        with autocast_off(weight.device.type):
            return torch.baddbmm(weight, left, right, alpha=self.scaling)

    def merged_weight(self, around: torch.dtype | None = None) -> Tensor:
        """The sum in the weight's dtype, rounded once, an expert at a time.

        A packed weight's is dense, of the dtype ``around``, and lies as the module's class has it.
        """
        weight, (left, right) = self.weight, self._factors()
        if isinstance(weight, Tensor):
            merged = torch.empty_like(weight, requires_grad=False)
        else:
            sizes = left.shape[0], left.shape[1], right.shape[2]
            merged = torch.empty(sizes, dtype=around or weight.dtype, device=weight.device)
        for i, into in enumerate(merged):
            if isinstance(weight, Tensor):
                add_product(weight[i], left[i], right[i], self.scaling, into)
            elif self.features.is_transposed:
                add_product(weight.one(i), right[i].mT, left[i].mT, self.scaling, into.mT)
            else:
                add_product(weight.one(i), left[i], right[i], self.scaling, into)
        return merged

    @property
    def merged(self) -> bool:
        return self.name in self.experts._bases

    @property
    def can_unmerge(self) -> bool:
        """Whether it is merged and its base was kept."""
        return self.experts._bases.get(self.name) is not None

    def use_merged(self, weight: Tensor, keep_base: bool = True, requantise: bool = True) -> float:
        """Put the merged weight in the base's place, and keep that aside for :meth:`unmerge`.

        Returns 0, how far it is from what was to be put.
        """
        self.experts.put_merged(self.name, weight, keep_base)
        return 0.0

    def unmerge(self) -> None:
        """Put the original Parameter back: the same bits, and tied again if it was tied."""
        self.experts.put_back(self.name)


def new_experts_adapter(
    module: nn.Module, name: str, r: int, init_lora_weights: bool | str, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    """Fresh lora_A [E · r, p] and lora_B [q, r · E] for the weight of this name."""
    shapes, device = features_of(module, name).shapes(r), weight_in(module, name).device
    return new_pair(shapes, device, dtype, r, init_lora_weights)


def names_of_pair(name: str) -> tuple[str, str]:
    """What a module calls lora_A and lora_B of its weight of this name."""
    return f"{name}{ADDED}A", f"{name}{ADDED}B"


class LoRAExperts(Adapted, PackedExperts):
    """An experts module's class, which comes after this one: methods and no constructor.

    A weight NAME that is adapted has ``NAME_lora_A`` [E · r, p] and ``NAME_lora_B`` [q, r · E]
    beside it, as PEFT has them.  A call is one node (``ops.experts``).  What that can't be is the
    module's own forward with weight + scaling · lora_B lora_A in place of each weight, which is
    slow, and has no dropout: where dropout would act, it is a RuntimeError.
    """

    adaptations: dict[str, Adaptation]  # in the order of the module's parameters
    lora_dropout: float

    def attach_adapters(
        self,
        adapters: Mapping[str, tuple[nn.Parameter, nn.Parameter, Adaptation]],
        lora_dropout: float,
    ) -> None:
        """Take lora_A and lora_B of each weight, and freeze all else.  Checks nothing."""
        self.requires_grad_(False)
        self.adaptations, self._bases = {}, {}
        self.lora_dropout = float(lora_dropout)
        for name, (*pair, adaptation) in adapters.items():
            for own, tensor in zip(names_of_pair(name), pair, strict=True):
                setattr(self, own, tensor)
            self.adaptations[name] = adaptation

    def detach_adapters(self) -> None:
        """Become the plain module again, in place, with merged weights where they are merged."""
        for name in (*self.adapter_names(), *_ADDED):
            delattr(self, name)
        settle(self)

    def adapted_weights(self) -> Iterable[tuple[str, ExpertsWeight]]:
        return [(name, self.weight_of(name)) for name in self.adaptations]

    def weight_of(self, name: str) -> "ExpertsWeight":
        return ExpertsWeight(**vars(self.adaptations[name]), experts=self, name=name)

    def forward(self, *args: Any, **named: Any) -> Tensor:
        if len(self._bases) == len(self.adaptations):
            refuse_training(self)
            if not needs_class(self):
                forward: Any = self.plain_class.forward
                return forward(self, *args, **named)
        return super().forward(*args, **named)

    def adapters_of(self, name: str) -> tuple[Adapter[Tensor], ...]:
        if name not in self.adaptations or name in self._bases:
            return ()
        return (self.weight_of(name).adapter(),)

    def sum_of(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.weight_of(name).sum(dtype)

    def adapter_names(self) -> Iterable[str]:
        return [own for name in self.adaptations for own in names_of_pair(name)]

    def extra_repr(self) -> str:
        adapters = [
            f"{name}: r={how.r}, lora_alpha={how.lora_alpha}"
            + (", merged" if name in self._bases else "")
            for name, how in self.adaptations.items()
        ]
        return "; ".join([*adapters, f"lora_dropout={self.lora_dropout}"])


def why_not_experts(module: nn.Module, names: Sequence[str]) -> str:
    """Why apply_lora can't give these parameters of a module adapters as experts; "" if it can."""
    if isinstance(module, LoRAExperts):
        return "it already has adapters (fastlora.remove_lora takes them away)"
    if is_class(type(module), *_SWIZZLED):
        return (
            "its MXFP4 numbers lie as a GPU kernel reads them: fastlora.load_packed(model, folder) "
            "reads the checkpoint into a model that isn't quantised"
        )
    experts = read_module(module)
    if experts.reason:
        return experts.reason
    other = next((name for name in names if name not in experts.names), "")
    if other:
        return f"{other} is no weight of its experts ({', '.join(experts.names)})"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (an accelerate hook?): remove that first"
    if "parametrizations" in module._modules:
        return "its weights are parametrised: make that permanent"
    ours = [*vars(LoRAExperts), *vars(PackedExperts)]
    added = [*_ADDED, *ours, *(own for name in names for own in names_of_pair(name))]
    known = PackedExperts if isinstance(module, PackedExperts) else nn.Module
    taken = next((n for n in added if hasattr(module, n) and not hasattr(known, n)), "")
    if taken:
        return f"it has a {taken!r} of its own, which LoRA experts have for themselves: rename that"
    ends = ("", "_bias") if experts.has_bias else ("",)
    packed = packed_names(module)
    for name in [name + end for name in experts.names for end in ends]:
        if name in packed:
            try:
                weight_in(module, name)
            except ValueError as error:
                return str(error)
            continue
        tensor = module._parameters.get(name)
        ndim = 2 if name.endswith("_bias") else 3
        reason = "is none" if tensor is None else why_not_tensor(tensor, ndim)
        if reason:
            return f"its {name} {reason}: fastlora takes dense floating tensors"
    if weight_in(module, experts.names[0]).shape[0] < 2:
        return "it has one expert alone"
    return ""
