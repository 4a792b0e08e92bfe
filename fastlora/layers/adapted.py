"""LoRALayer: what a linear layer of any class does with an adapter beside its frozen weight.

And what other modules with adapters do as well (:class:`Adapted`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import Call
from ..blocks import buffer_for, source_of, widened
from ..ops.dispatch import autocast_off
from ..ops.functional import linears
from ..ops.run import run_one
from ..projection import Adapter, Base, Output
from ..text import shown
from .guards import Record, Recorder, call_recorded, forget
from .members import tensor_of

# Of a tensor on meta.
UNLOADED = (
    "without numbers: load it, or take accelerate's offload away first "
    "(accelerate.hooks.remove_hook_from_submodules(model))"
)


class Adapted(nn.Module):
    """A module with adapters, whose state dict has what its base's has, and the adapters."""

    plain_class: type[nn.Module]  # what it is without its adapters
    lora_settings: tuple[str, ...]  # what it has while it has adapters, beside these
    # Of merged weights, by name, what was there before: a parameter, or a layer of the base's class
    # that holds a packed weight; None if it wasn't kept.  It is in no state dict.
    _bases: dict[str, Any]

    def put_back(self, name: str) -> None:
        """Put the original Parameter back: the same bits, and tied again if it was tied."""
        base = self._bases.pop(name)
        if isinstance(base, nn.Module):  # a packed weight, which torch puts in no parameter's place
            delattr(self, name)
        setattr(self, name, base)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for base in self._bases.values():  # .to(), .cuda() and .half() reach what is kept aside
            if isinstance(base, nn.Module):
                base._apply(fn)
            elif base is not None:
                base.data = fn(base.data)
        return self

    def adapted_weights(self) -> Iterable[tuple[str, "AdaptedWeight"]]:
        """Each adapted weight as a layer, by its name in this module; a layer's own is ""."""
        raise NotImplementedError

    def adapter_names(self) -> list[str]:
        """What it calls each lora_A and lora_B."""
        return [name for _, weight in self.adapted_weights() for name in weight.pair_names()]

    def detach_adapter(self) -> None:
        """Become the plain module again, in place, with merged weights where they are merged."""
        forget(self)
        for name in (*self.adapter_names(), *self.lora_settings, "_bases"):
            delattr(self, name)
        object.__setattr__(self, "__class__", self.plain_class)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        merged = [f"{prefix}{name}" for name in self._bases]
        # Of a packed one there are its tensors.
        merged = [n for n in merged if any(f"{key}.".startswith(f"{n}.") for key in state_dict)]
        if merged:
            errors.append(
                f"{merged[0].removesuffix('.weight')} is merged: call fastlora.unmerge_lora(model) "
                "before loading weights"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        adapters = {f"{prefix}{name}" for name in self.adapter_names()}
        if adapters <= set(missing):
            # A checkpoint of the base, which knows no adapter.
            missing[:] = [key for key in missing if key not in adapters]


class Features(NamedTuple):
    """A weight as PEFT sees it: it has lora_A [experts · r, p] and lora_B [q, r · experts].

    A linear layer is one expert, with p = in_features and q = out_features.
    """

    experts: int
    p: int
    q: int

    def shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of lora_A and lora_B; the expert is the slowest index of one, the fastest of the other"""
        return (self.experts * r, self.p), (self.q, r * self.experts)


class AdaptedWeight:
    """A frozen weight and its adapter, as those see them that walk a model's layers."""

    r: int
    lora_alpha: float
    use_rslora: bool
    scaling: float
    weight: Any
    plain_class: type[nn.Module]  # what its module is without adapters
    why_not_fast: Any = ""  # why its calls are no node
    adapted_module: Any  # that it is a weight of; a layer is itself
    adapted_name = "weight"  # of the parameter in that
    adapted_features: Any  # Features
    weight_name: Any = "weight"  # what it calls the tensor that is its weight, packed or not

    @property
    def shape(self) -> tuple[int, int]:
        """out_features, in_features."""
        return self.adapted_features.q, self.adapted_features.p

    def adapted_output(self) -> Output:
        """What a call computes with, for a report.  Raises ValueError if it can't be read."""
        raise NotImplementedError

    def check_weight(self, name: str) -> None:
        """Raise ValueError unless the weight is a parameter, which can be replaced."""
        raise NotImplementedError

    def merged_weight(self, around: torch.dtype | None = None) -> Tensor:
        """weight + scaling · lora_B lora_A, rounded once, an expert at a time.

        ``around``: the dtype for a weight that is packed, where the model has one.
        """
        return add_product(self.weight, *self._factors(), self.scaling)

    @property
    def adapted_parameters(self) -> int:
        """How many parameters of the base the adapter changes, in all experts."""
        return math.prod(self.adapted_features)

    @property
    def adapter_pair(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B."""
        lora_a, lora_b = self.pair_names()
        return tensor_of(self.adapted_module, lora_a), tensor_of(self.adapted_module, lora_b)

    def pair_names(self) -> tuple[str, str]:
        """What the module calls lora_A and lora_B."""
        return "lora_A", "lora_B"

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The two whose product is the adapter's part of the weight, as the module stores that."""
        return self.adapter_pair[1], self.adapter_pair[0]

    def adapted_sum(self, dtype: torch.dtype | None = None) -> Tensor:
        """weight + scaling · lora_B lora_A, of every expert, which autograd follows.

        In the weight's dtype, or in this one if that is packed.
        """
        weight = self._dense(dtype)
        left, right = (factor.to(weight.dtype) for factor in self._factors())
        with autocast_off(weight.device.type):
            add = torch.addmm if weight.dim() == 2 else torch.baddbmm
            return add(weight, left, right, alpha=self.scaling)

    def _dense(self, dtype: torch.dtype | None) -> Tensor:
        return self.weight

    def _device(self) -> torch.device:
        return self.weight.device

    def check_adapter(self, name: str) -> None:
        """Raise ValueError unless lora_A and lora_B fit the weight, and are where its numbers are.

        torch adds a tensor without numbers (on meta) to any other, and says nothing.
        """
        device = self._device()
        if device.type == "meta":
            raise ValueError(f"{name} can't be merged: its weight is on meta, {UNLOADED}")
        labels, shapes = self.pair_names(), self.adapted_features.shapes(self.r)
        for label, shape in zip(labels, shapes, strict=True):
            tensor: Any = getattr(self.adapted_module, label, None)
            if not isinstance(tensor, Tensor):
                reason = f"is {shown(tensor)}, but must be a tensor {list(shape)}"
            elif tensor.shape != shape:
                reason = f"has shape {tuple(tensor.shape)}, but must be {list(shape)}"
            elif tensor.device != device:
                reason = f"is on {tensor.device}, but the weight is on {device}: move it there"
            else:
                continue
            raise ValueError(f"{name} can't be merged: its {label} {reason}")

    def use_merged(self, weight: Tensor, keep_base: bool = True, requantize: bool = True) -> float:
        """Put the merged weight in the base's place, and keep that aside for :meth:`unmerge`.

        Returns how far a weight that is packed again is from it, in parts of its size.
        ``requantize``: a packed one is packed again.
        """
        module, name = self.adapted_module, self.adapted_name
        module._bases[name] = getattr(module, name) if keep_base else None
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return 0.0

    def unmerge(self) -> None:
        """Put the original weight back: the same bits, and tied again if it was tied."""
        if not self.can_unmerge:
            raise ValueError("the layer isn't merged, or its base wasn't kept: nothing to restore")
        self.adapted_module.put_back(self.adapted_name)

    @property
    def merged(self) -> bool:
        return self.adapted_name in self.adapted_module._bases

    @property
    def can_unmerge(self) -> bool:
        """Whether it is merged and its base was kept."""
        return self.adapted_module._bases.get(self.adapted_name) is not None


class LoRALayer(AdaptedWeight, Adapted):
    """A base's class, which comes after this one, with an adapter: it has methods alone."""

    weight: Tensor
    bias: Any  # a tensor or None
    in_features: int
    out_features: int
    lora_settings = ("r", "lora_alpha", "use_rslora", "lora_dropout", "scaling")
    adapted_module = property(lambda self: self)
    adapted_features = property(lambda self: Features(1, *self.shape[::-1]))

    @property
    def shape(self) -> tuple[int, int]:
        """out_features, in_features."""
        return self.out_features, self.in_features

    def attach_adapter(
        self,
        adapter: tuple[nn.Parameter, nn.Parameter],
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
    ) -> None:
        """Take lora_A and lora_B, freeze weight and bias, and start unmerged.  Checks nothing."""
        self.requires_grad_(False)
        self.lora_A, self.lora_B = adapter
        self.r, self.lora_alpha, self.use_rslora = len(self.lora_A), lora_alpha, use_rslora
        self.lora_dropout = float(lora_dropout)
        self.scaling = scaling_of(lora_alpha, self.r, use_rslora)
        self._bases = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            refuse_training(self)
            return self.run_merged(x)
        y = call_recorded(self, x, _RECORDER)
        assert y is not None
        return y

    def run_merged(self, x: Tensor) -> Tensor:
        """The output for x of a layer that is merged."""
        return super().forward(x)

    def read(self) -> Record:
        """What a call that isn't merged computes with."""
        return Record("", (self.adapted_output(),), (self.lora_dropout,))

    def run(self, x: Tensor, record: Record) -> tuple[Tensor, Call | None]:
        """The output for x of a layer that was read so; and its record."""
        (dropout,) = record.dropouts
        (y,), call = linears(x, record.outputs, dropout, self.training)
        return y, call

    def adapted_output(self) -> Output:
        return self.output_over(tensor_of(self, "weight"))

    def output_over(self, weight: Any) -> Output:
        """What a call computes with, of this weight [out, in], which may be packed."""
        lora_a, lora_b, bias = [tensor_of(self, name) for name in ("lora_A", "lora_B", "bias")]
        return Output(Base(weight, bias), (Adapter(lora_a, lora_b, self.scaling),))

    def check_weight(self, name: str) -> None:
        reason = why_weight_is_fixed(self, self.weight_name)
        if reason:
            raise ValueError(f"{name} can't be merged or removed: {reason}")

    @property
    def merged(self) -> bool:
        # Sooner than by name, which each call would ask for.  Dynamo guards the length, and not the
        # truth of an empty dict.
        return len(self._bases) > 0

    def adapted_weights(self) -> Iterable[tuple[str, AdaptedWeight]]:
        return [("", self)]

    def extra_repr(self) -> str:
        out_features, in_features = self.shape
        shape = f"in_features={in_features}, out_features={out_features}"
        settings = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        has_bias = self.bias is not None
        return f"{shape}, bias={has_bias}, {settings}" + (", merged" if self.merged else "")

    __repr__ = nn.Module.__repr__  # Conv1D has one of its own


_RECORDER = Recorder(
    lambda layer, x: False,
    lambda layer: layer.read(),
    lambda layer: (),
    lambda layer, x, record: layer.run(x, record),
    run_one,
)


def refuse_training(merged: nn.Module) -> None:
    """Raise RuntimeError in a call of a merged layer that trains."""
    if merged.training and torch.is_grad_enabled():
        raise RuntimeError(
            "this LoRA layer is merged, so its adapter would get no gradient: call "
            "fastlora.unmerge_lora(model) before training, or model.eval() for inference"
        )


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def wide_dtype(weight: Tensor) -> torch.dtype:
    """Of an adapter that is not to be 16-bit beside this weight, which may be packed."""
    if not isinstance(weight, Tensor) or weight.element_size() < 4:
        return torch.float32
    return weight.dtype


def new_adapter(
    weight: Tensor,
    r: int,
    init_lora_weights: bool | str = True,
    dtype: torch.dtype | None = None,
    features: Features | None = None,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Fresh lora_A and lora_B for weight [out, in], or of other ``features``.

    They have its dtype or ``dtype``.  ``init_lora_weights`` True: the identity change.  "gaussian":
    lora_A from N(0, 1/r²).  False: lora_B random too.
    """
    shapes = (features or Features(1, *weight.shape[::-1])).shapes(r)
    how: Any = {"device": weight.device, "dtype": dtype or weight.dtype}
    lora_a, lora_b = (nn.Parameter(torch.empty(shape, **how)) for shape in shapes)
    if init_lora_weights == "gaussian":
        nn.init.normal_(lora_a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_b)
    return lora_a, lora_b


def run_with(
    module: nn.Module, weights: Mapping[str, Tensor], run: Callable, args: tuple, named: dict
) -> Any:
    """What ``run`` returns with these tensors in the place of the module's parameters.

    Or, while it runs, of what hasn't one: of a packed weight.
    """
    parameters: Any = module._parameters
    before = {name: parameters[name] for name in weights if name in parameters}
    try:
        parameters.update(weights)
        return run(*args, **named)
    finally:
        for name in weights.keys() - before.keys():
            del parameters[name]
        parameters.update(before)


def add_product(
    base: Any, left: Tensor, right: Tensor, scale: float, merged: Tensor | None = None
) -> Tensor:
    """base + scale · left right, computed in float32 or wider, and rounded once.

    To ``merged``, or a new tensor like the base.  Block by block of rows, so that no wide copy of
    the whole base is made, which may be packed.
    """
    merged = torch.empty_like(base, requires_grad=False) if merged is None else merged
    wide = torch.promote_types(base.dtype, torch.float32)
    with torch.no_grad(), autocast_off(merged.device.type):
        left, right = left.to(wide), right.to(wide)
        for rows, some in widened(source_of(base), buffer_for(base, wide)):
            merged[rows] = torch.addmm(some, left[rows], right, alpha=scale)
    return merged


def why_weight_is_fixed(layer: nn.Module, name: str = "weight") -> str:
    """Why the weight can't be replaced by another Parameter; "" if it can.  ``name``: its own."""
    if name in layer._parameters or (name != "weight" and name in layer._buffers):
        return ""
    return "its weight is computed (weight_norm, pruning, a parametrization): make that permanent"


def own_name(layer: nn.Module) -> str:
    """A name that this layer has for itself, and a LoRA layer for something else; "" if none."""
    added = ("lora_A", "lora_B", *LoRALayer.lora_settings, "_bases")
    names = (*added, *vars(LoRALayer), *vars(AdaptedWeight), *vars(Adapted))
    return next((n for n in names if hasattr(layer, n) and not hasattr(nn.Linear, n)), "")
