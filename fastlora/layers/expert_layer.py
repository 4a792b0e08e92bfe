"""LoRAExperts: an experts module of a transformers model with adapters on its weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..ops.textbook import needs_textbook
from ..projection import Base, Output
from .adapted import refuse_training
from .base import tensor_of, why_not_tensor
from .expert_weight import Adaptation, ExpertsWeight
from .experts import ADDED, Experts, read_experts_module, run_experts, takes

_ADDED = ("adaptations", "lora_dropout", "_base_weights")


class LoRAExperts(nn.Module):
    """An experts module's class, which comes after this one: methods and no constructor.

    A weight NAME that is adapted has ``NAME_lora_A`` [E · r, p] and ``NAME_lora_B`` [q, r · E]
    beside it, as PEFT has them.  A call is one node (``ops.experts``).  What that can't be is the
    module's own forward with weight + scaling · lora_B lora_A in place of each weight, which is
    slow, and has no dropout: where dropout would act, it is a RuntimeError.
    """

    plain_class: type[nn.Module]  # what it is without its adapters
    adaptations: dict[str, Adaptation]  # in the order of the module's parameters
    lora_dropout: float
    _base_weights: dict[str, nn.Parameter | None]  # of merged weights; None if it wasn't kept

    def attach_adapters(
        self,
        adapters: Mapping[str, tuple[nn.Parameter, nn.Parameter, Adaptation]],
        lora_dropout: float,
    ) -> None:
        """Take lora_A and lora_B of each weight, and freeze all else.  Checks nothing."""
        self.requires_grad_(False)
        self.adaptations, self._base_weights = {}, {}
        self.lora_dropout = float(lora_dropout)
        for name, (lora_a, lora_b, adaptation) in adapters.items():
            setattr(self, f"{name}{ADDED}A", lora_a)
            setattr(self, f"{name}{ADDED}B", lora_b)
            self.adaptations[name] = adaptation

    def detach_adapters(self) -> None:
        """Become the plain module again, in place, with merged weights where they are merged."""
        for name in self.adaptations:
            delattr(self, f"{name}{ADDED}A")
            delattr(self, f"{name}{ADDED}B")
        for name in _ADDED:
            delattr(self, name)
        object.__setattr__(self, "__class__", self.plain_class)

    def weights(self) -> Iterator[ExpertsWeight]:
        """Each adapted weight as a layer."""
        return (ExpertsWeight(self, name) for name in self.adaptations)

    def forward(self, *args: Any, **named: Any) -> Tensor:
        if len(self._base_weights) == len(self.adaptations):
            refuse_training(self)
            return super().forward(*args, **named)
        experts = self.read()
        reason = experts.reason
        if args and isinstance(args[0], Tensor) and needs_textbook(args[0]):
            reason = reason or "a transform, tracing or forward-mode differentiation is active"
        if not (reason or named):
            up, down = (self._output(name, experts) for name in experts.names)
            if takes(args, experts, (up, down)):
                dropout = self.lora_dropout if self.training else 0.0
                return run_experts(args, experts, up, down, dropout)
        return self._by_its_own_forward(reason or "its arguments are others", args, named)

    def read(self) -> Experts:
        """How a call computes, or why it is the module's own forward's."""
        experts = read_experts_module(self, self.plain_class)
        if "parametrizations" in self._modules:
            return Experts("its weights are parametrised")
        return experts

    def _output(self, name: str, experts: Experts) -> Output[Tensor]:
        weight = tensor_of(self, name)
        bias = tensor_of(self, f"{name}_bias") if experts.has_bias else None
        base = Base(weight.mT if experts.transposed else weight, bias)
        if name not in self.adaptations or name in self._base_weights:
            return Output(base, ())
        lora_a, lora_b = (tensor_of(self, f"{name}{ADDED}{part}") for part in "AB")
        adapter = self.adaptations[name].stacked(lora_a, lora_b, experts.transposed)
        return Output(base, (adapter,))

    def _by_its_own_forward(self, reason: str, args: tuple, named: dict) -> Tensor:
        """The class's forward with the sums in place of the weights."""
        names = self.adaptations.keys() - self._base_weights.keys()
        if self.lora_dropout and self.training:
            raise RuntimeError(f"this call of experts can't have lora_dropout: {reason}")
        if not self._parameters.keys() >= names:
            raise RuntimeError(f"this call of experts can't have its adapters: {reason}")
        kept = {name: self._parameters[name] for name in names}
        sums = {name: ExpertsWeight(self, name).sum() for name in names}
        try:
            self._parameters.update(sums)  # type: ignore[arg-type]
            return super().forward(*args, **named)
        finally:
            self._parameters.update(kept)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for weight in self._base_weights.values():
            if weight is not None:  # .to(), .cuda() and .half() reach what is kept aside
                weight.data = fn(weight.data)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        merged = [name for name in self._base_weights if f"{prefix}{name}" in state_dict]
        if merged:
            errors.append(
                f"{prefix}{merged[0]} is merged: call fastlora.unmerge_lora(model) before loading "
                "weights"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        adapters = {f"{prefix}{name}{ADDED}{part}" for name in self.adaptations for part in "AB"}
        if adapters <= set(missing):
            # A checkpoint of the base, which knows no adapters.
            missing[:] = [key for key in missing if key not in adapters]

    def extra_repr(self) -> str:
        adapters = [
            f"{name}: r={how.r}, lora_alpha={how.lora_alpha}"
            + (", merged" if name in self._base_weights else "")
            for name, how in self.adaptations.items()
        ]
        return "; ".join([*adapters, f"lora_dropout={self.lora_dropout}"])


_CLASSES: dict[type[nn.Module], type[LoRAExperts]] = {}


def adapted_experts_class(kind: type[nn.Module]) -> type[LoRAExperts]:
    """The class of an experts module that has adapters; it is the module's class, too."""
    if kind not in _CLASSES:
        members = {"plain_class": kind, "__reduce_ex__": _reduce_ex}
        _CLASSES[kind] = type(f"LoRA{kind.__name__}", (LoRAExperts, kind), members)
    return _CLASSES[kind]


def _reduce_ex(module: LoRAExperts, protocol: Any) -> tuple:
    """As for any object, with the plain class in place of one that nobody can import."""
    made: Any = module.plain_class.__reduce_ex__(module, protocol)
    return _blank, (module.plain_class,), *made[2:]


def _blank(kind: type[nn.Module]) -> LoRAExperts:
    return object.__new__(adapted_experts_class(kind))


def why_not_experts(module: nn.Module, names: Sequence[str]) -> str:
    """Why apply_lora can't give these parameters of a module adapters as experts; "" if it can."""
    if isinstance(module, LoRAExperts):
        return "it already has adapters (fastlora.remove_lora takes them away)"
    experts = read_experts_module(module, type(module))
    if experts.reason:
        return experts.reason
    other = next((name for name in names if name not in experts.names), "")
    if other:
        return f"{other} is no weight of its experts ({', '.join(experts.names)})"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (an accelerate hook?): remove that first"
    if "parametrizations" in module._modules:
        return "its weights are parametrised: make that permanent"
    added = (*_ADDED, "weights", "read", *(f"{n}{ADDED}{part}" for n in names for part in "AB"))
    taken = next((name for name in added if hasattr(module, name)), "")
    if taken:
        return f"it has a {taken!r} of its own, which LoRA experts have for themselves: rename that"
    ends = ("", "_bias") if experts.has_bias else ("",)
    for name in [name + end for name in experts.names for end in ends]:
        tensor = module._parameters.get(name)
        reason = "is none" if tensor is None else why_not_tensor(tensor, 2 if "bias" in name else 3)
        if reason:
            return f"its {name} {reason}: fastlora takes dense floating tensors"
    if len(tensor_of(module, experts.names[0])) < 2:
        return "it has one expert alone"
    return ""
