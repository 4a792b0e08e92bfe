"""LoRAExperts: an experts module of a transformers model with packed weights, adapters, or both.

A weight's adapter is two matrices for all experts together, as in PEFT's files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import is_class
from ..formats import gguf
from ..formats.float8 import SCALE
from ..formats.format import Quantized
from ..ops.dispatch import why_composite
from ..projection import Adapter, Base, Output
from .adapted import Adapted, refuse_training, run_with
from .adapted_weight import AdaptedWeight, Features, Pair, scaling_of
from .classes import change_class, class_over
from .experts import (
    ADDED,
    Experts,
    PackedWeight,
    dense_weight,
    features_of,
    lies_transposed,
    needs_class,
    packed_names,
    read_module,
    run_experts,
    stack_in,
    stacked,
    takes,
    weight_in,
)
from .members import plain_class_of, tensor_of, why_not_tensor
from .merging import add_product

_SWIZZLED = ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts")


@dataclass(frozen=True)
class Adaptation:
    """The settings of one weight's adapter."""

    features: Features
    r: int  # of each expert
    lora_alpha: float
    use_rslora: bool


class ExpertsWeight(AdaptedWeight):
    """One adapted weight of an experts module.

    The module holds all tensors.  This object is made whenever it is needed.
    """

    def __init__(self, experts: "LoRAExperts", name: str) -> None:
        how = experts.adaptations[name]
        self.adapted_module, self.adapted_name, self.adapted_features = experts, name, how.features
        self.r, self.lora_alpha, self.use_rslora = how.r, how.lora_alpha, how.use_rslora
        self.scaling = scaling_of(how.lora_alpha, how.r, how.use_rslora)
        self.plain_class = experts.plain_class

    # A tensor, or a packed stack.
    weight = property(lambda self: weight_in(self.adapted_module, self.adapted_name))
    why_not_fast = property(lambda self: self.adapted_module.read().reason)

    def pair_names(self) -> tuple[str, str]:
        return names_of_pair(self.adapted_name)

    def adapter(self) -> Adapter[Tensor]:
        """The adapter for ``ops.experts``: lora_a [E, r, in] and lora_b [E, out, r]."""
        return stacked(*self.adapter_pair, self.adapted_features.experts, self.scaling)

    def adapted_output(self) -> Output[Tensor]:
        """The weight and its adapter as stored: not stacked by expert, and sharded under FSDP."""
        return Output(Base(self.weight, None), (Adapter(*self.adapter_pair, self.scaling),))

    def check_weight(self, name: str) -> None:
        experts = self.adapted_module
        if self.adapted_name not in (*experts._parameters, *packed_names(experts)):
            raise ValueError(
                f"{name} can't be merged or removed: it is computed (a parametrization): make that "
                "permanent"
            )

    def _factors(self) -> tuple[Tensor, Tensor]:
        lora_a, lora_b, _ = self.adapter()
        is_reverse = lies_transposed(self.adapted_module)
        return (lora_a.mT, lora_b.mT) if is_reverse else (lora_b, lora_a)

    def _dense(self, dtype: torch.dtype | None) -> Tensor:
        weight = self.weight
        if isinstance(weight, Tensor) or dtype is None:
            return weight
        return dense_weight(self.adapted_module, self.adapted_name, dtype)

    def merged_weight(self, around: torch.dtype | None = None) -> Tensor:
        weight = self.weight
        if isinstance(weight, Tensor):
            return super().merged_weight()
        # The result for a packed weight [E, N, K] is dense, in the layout of the module's class.
        (experts, N, K), is_transposed = weight.shape, lies_transposed(self.adapted_module)
        how: Any = {"dtype": around or weight.dtype, "device": weight.device}
        merged = torch.empty((experts, K, N) if is_transposed else (experts, N, K), **how)
        lora_a, lora_b, _ = self.adapter()
        add_product(weight, lora_b, lora_a, self.scaling, merged.mT if is_transposed else merged)
        return merged


def names_of_pair(name: str) -> tuple[str, str]:
    """The names of lora_A and lora_B for the weight of this name."""
    return f"{name}{ADDED}A", f"{name}{ADDED}B"


class LoRAExperts(Adapted):
    """A mixin for classes of experts: :func:`class_over` derives from this class and the module's.

    A packed weight NAME is a :class:`PackedWeight` of that name.  In transformers' ``FP8Experts``
    it is two parameters, in ``GgufExperts`` one.  An adapted weight has ``NAME_lora_A`` [E · r, p]
    and ``NAME_lora_B`` [q, r · E] beside it, with PEFT's shapes.

    A call is one node (``ops.experts``).  Where the node can't run, the module's own forward runs
    with weights that are made for this call: weight + scaling · lora_B lora_A, or a packed weight
    as a dense tensor.  This fallback is slow and has no dropout, so it raises RuntimeError if
    dropout would act.
    """

    lora_settings = ("adaptations", "lora_dropout")
    # By name of the weight, in the order of the module's parameters.  Empty if weights are only
    # packed.
    adaptations: Mapping[str, Adaptation] = MappingProxyType({})
    _bases: Any = MappingProxyType({})
    lora_dropout = 0.0

    def attach_adapter(
        self, adapter: Pair, lora_alpha: float, lora_dropout: float, use_rslora: bool, name: str
    ) -> None:
        """Add lora_A and lora_B for this weight.  Checks nothing.

        The module's first adapter freezes all other parameters.
        """
        if not self.adaptations:
            self.requires_grad_(False)
            self._bases, self.lora_dropout = {}, float(lora_dropout)
        features = features_of(self, name)
        how = Adaptation(features, len(adapter[0]) // features.experts, lora_alpha, use_rslora)
        self.adaptations = {**self.adaptations, name: how}
        for its_name, tensor in zip(names_of_pair(name), adapter, strict=True):
            setattr(self, its_name, tensor)

    def detach_adapter(self) -> None:
        super().detach_adapter()
        settle(self)

    def adapted_weights(self) -> Iterable[tuple[str, ExpertsWeight]]:
        return [(name, ExpertsWeight(self, name)) for name in self.adaptations]

    def forward(self, *args: Any, **named: Any) -> Tensor:
        if self.adaptations and len(self._bases) == len(self.adaptations):  # all are merged
            refuse_training(self)
            if not needs_class(self):
                forward: Any = self.plain_class.forward
                return forward(self, *args, **named)
        experts = self.read()
        reason = experts.reason
        if args and isinstance(args[0], Tensor):
            reason = reason or why_composite(args[0])
        if not (reason or named):
            up, down = (self._output(name, experts) for name in experts.names)
            if takes(args, (up, down)):
                dropout = self.lora_dropout if self.training else 0.0
                return run_experts(args, experts, up, down, dropout)
        return self._by_its_own_forward(reason or "its arguments are others", args, named)

    def read(self) -> Experts:
        """How a call computes, or the reason why the module's own forward must run."""
        if "parametrizations" in self._modules:
            return Experts("its weights are parametrized")
        return read_module(self)

    def _output(self, name: str, experts: Experts) -> Output[Any]:
        """The weight as [E, out, in], its bias, and its adapter unless that is merged."""
        bias = tensor_of(self, f"{name}_bias") if experts.has_bias else None
        added = name in self.adaptations and name not in self._bases
        adapters = (ExpertsWeight(self, name).adapter(),) if added else ()
        return Output(Base(stack_in(self, name), bias), adapters)

    def _by_its_own_forward(self, reason: str, args: tuple, named: dict) -> Tensor:
        """The class's forward with dense weights: adapted ones with their adapter added."""
        if gguf.is_experts(self.plain_class):  # its own forward is a GPU kernel for GGUF's blocks
            raise RuntimeError(f"this call of GGUF's experts can't be made: {reason}")
        adapted, packed = self.adaptations.keys() - self._bases.keys(), set(packed_names(self))
        if self.lora_dropout and self.training and adapted:
            raise RuntimeError(f"this call of experts can't have lora_dropout: {reason}")
        if not self._parameters.keys() | packed >= adapted:
            raise RuntimeError(f"this call of experts can't have its adapters: {reason}")
        given = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
        lost = [name for name in packed if weight_in(self, name).device.type == "meta"]
        if lost and not all(x.is_meta for x in given):  # torch would compute without numbers
            raise RuntimeError(f"{lost[0]} is packed, and on meta: it isn't loaded, or offloaded")
        dtype = next((x.dtype for x in given if x.is_floating_point()), torch.float32)
        weights = {name: ExpertsWeight(self, name).adapted_sum(dtype) for name in adapted}
        weights |= {name: dense_weight(self, name, dtype) for name in packed - adapted}
        forward: Any = self.plain_class.forward
        while any(n.endswith(SCALE) for n in self._parameters) and hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__  # FP8Experts' undecorated forward takes dense weights
        return run_with(self, weights, partial(forward, self), args, named)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(_sparing(self, fn), recurse)  # also spares codes in self._bases

    def extra_repr(self) -> str:
        if not self.adaptations:
            return super().extra_repr()
        adapters = [
            f"{name}: r={how.r}, lora_alpha={how.lora_alpha}"
            + (", merged" if name in self._bases else "")
            for name, how in self.adaptations.items()
        ]
        return "; ".join([*adapters, f"lora_dropout={self.lora_dropout}"])


def _sparing(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` for an experts module's ``_apply``, without casts of codes and scales.

    Codes (1-byte elements) and their scales move to another device, but keep their dtype.
    """
    scales = {id(p) for name, p in module._parameters.items() if name.endswith(SCALE)}

    def apply(tensor: Tensor) -> Tensor:
        made = fn(tensor)
        if made.dtype != tensor.dtype and (tensor.element_size() == 1 or id(tensor) in scales):
            return tensor.to(made.device)
        return made

    return apply


def take_packed(module: Any, weights: Mapping[str, Quantized]) -> None:
    """Replace parameters of an experts module by these packed weights."""
    for name, weight in weights.items():
        delattr(module, name)
        setattr(module, name, PackedWeight(weight))
    settle(module)


def settle(module: Any) -> None:
    """Set the class of a module without adapters, so that it runs its current weights."""
    kind = plain_class_of(module)
    packed = needs_class(module)
    change_class(module, class_over(LoRAExperts, kind, "Packed") if packed else kind)


def why_not_experts(module: nn.Module, names: Sequence[str]) -> str:
    """Why apply_lora can't give these parameters of a module adapters as experts; "" if it can."""
    if isinstance(module, LoRAExperts) and module.adaptations:
        return "it already has adapters (fastlora.remove_lora takes them away)"
    if is_class(type(module), *_SWIZZLED):
        return (
            "its MXFP4 weights have the layout of a GPU kernel: load the checkpoint with "
            "fastlora.load_packed(model, folder) into a model that isn't quantized"
        )
    experts = read_module(module)
    if experts.reason:
        return experts.reason
    if other := next((name for name in names if name not in experts.names), ""):
        return f"{other} is no weight of its experts ({', '.join(experts.names)})"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (an accelerate hook?): remove that first"
    if "parametrizations" in module._modules:
        return "its weights are parametrized: make that permanent"
    if needs_class(module) and not isinstance(module, LoRAExperts):
        return "its weights are dense, in a class for float8: a cast of codes lost their scales"
    added = [*vars(LoRAExperts), *(each for name in names for each in names_of_pair(name))]
    known = LoRAExperts if isinstance(module, LoRAExperts) else nn.Module
    taken = next((n for n in added if hasattr(module, n) and not hasattr(known, n)), "")
    if taken:
        return f"it has a {taken!r} of its own, a name that LoRA experts need: rename that"
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
        return "it has only one expert"
    return ""
