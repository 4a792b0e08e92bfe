"""LoRAExperts: an experts module of a transformers model with adapters on its weights.

PEFT's files hold the adapter of a weight in two matrices, and so do these modules.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import is_class
from ..projection import Adapter, Base, Output
from .adapted import Adapted, AdaptedWeight, Features, add_product, refuse_training, scaling_of
from .experts import ADDED, stacked
from .members import why_not_tensor
from .packed import (
    PackedExperts,
    dense_weight,
    needs_class,
    packed_names,
    read_module,
    settle,
    sparing,
    weight_in,
)

_SWIZZLED = ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts")


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


class ExpertsWeight(AdaptedWeight):
    """One adapted weight of an experts module."""

    def __init__(self, experts: "LoRAExperts", name: str, how: Adaptation) -> None:
        self.experts, self.name, self.features = experts, name, how.features
        self.r, self.lora_alpha, self.use_rslora = how.r, how.lora_alpha, how.use_rslora
        self.scaling = scaling_of(how.lora_alpha, how.r, how.use_rslora)

    adapted_module = property(lambda self: self.experts)
    adapted_name = property(lambda self: self.name)
    adapted_features = property(lambda self: self.features)
    weight = property(lambda self: weight_in(self.experts, self.name))  # a tensor, or packed
    plain_class = property(lambda self: self.experts.plain_class)
    why_not_fast = property(lambda self: self.experts.read().reason)

    @property
    def shape(self) -> tuple[int, int]:
        """PEFT's out_features and in_features."""
        return self.features.q, self.features.p

    def pair_names(self) -> tuple[str, str]:
        return names_of_pair(self.name)

    def adapter(self) -> Adapter[Tensor]:
        """The two for ``ops.experts``: lora_a [E, r, in] and lora_b [E, out, r]."""
        return stacked(*self.adapter_pair, self.features.experts, self.scaling)

    def adapted_output(self) -> Output[Tensor]:
        """The weight and its adapter as they are kept: not stacked, sharded under FSDP."""
        return Output(Base(self.weight, None), (Adapter(*self.adapter_pair, self.scaling),))

    def check_weight(self, name: str) -> None:
        if self.name not in (*self.experts._parameters, *packed_names(self.experts)):
            raise ValueError(
                f"{name} can't be merged or removed: it is computed (a parametrisation): make that "
                "permanent"
            )

    def _factors(self) -> tuple[Tensor, Tensor]:
        lora_a, lora_b, _ = self.adapter()
        return (lora_a.mT, lora_b.mT) if self.features.is_transposed else (lora_b, lora_a)

    def _dense(self, dtype: torch.dtype | None) -> Tensor:
        weight = self.weight
        if isinstance(weight, Tensor) or dtype is None:
            return weight
        return dense_weight(self.experts, self.name, dtype)

    def merged_weight(self, around: torch.dtype | None = None) -> Tensor:
        # A packed weight's is dense, of the dtype around, and lies as the module's class has it.
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

    lora_settings = ("adaptations", "lora_dropout")
    adaptations: dict[str, Adaptation]  # in the order of the module's parameters
    lora_dropout: float

    def attach_adapter(
        self,
        adapter: tuple[nn.Parameter, nn.Parameter],
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        name: str,
    ) -> None:
        """Take lora_A and lora_B of this weight; the first freezes all else.  Checks nothing."""
        if "adaptations" not in self.__dict__:
            self.requires_grad_(False)
            self.adaptations, self._bases = {}, {}
            self.lora_dropout = float(lora_dropout)
        features = features_of(self, name)
        r = len(adapter[0]) // features.experts
        self.adaptations[name] = Adaptation(features, r, lora_alpha, use_rslora)
        for its_name, tensor in zip(names_of_pair(name), adapter, strict=True):
            setattr(self, its_name, tensor)

    def detach_adapter(self) -> None:
        super().detach_adapter()
        settle(self)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(sparing(self, fn), recurse)  # codes that are kept aside, too

    def adapted_weights(self) -> Iterable[tuple[str, ExpertsWeight]]:
        return [(name, self.weight_of(name)) for name in self.adaptations]

    def weight_of(self, name: str) -> "ExpertsWeight":
        return ExpertsWeight(self, name, self.adaptations[name])

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
        return self.weight_of(name).adapted_sum(dtype)

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
    if needs_class(module) and not isinstance(module, PackedExperts):
        return "its weights are dense, in a class for float8: a cast of codes lost their scales"
    ours = [*LoRAExperts.lora_settings, "_bases", *vars(LoRAExperts), *vars(PackedExperts)]
    added = [*ours, *(each for name in names for each in names_of_pair(name))]
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
