"""LoRALayer: a linear layer of any class with an adapter beside its frozen weight.

Three classes, from general to special:

* :class:`Adapted`: a module with adapters (state dict, merged weights, removal of the adapters).
* :class:`AdaptedWeight`: one frozen weight of such a module, with its adapter.
* :class:`LoRALayer`: a linear layer, which is both.
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
from ..projection import Adapter, Base, Output, shown
from .guards import Record, Recorder, call_recorded, forget
from .members import tensor_of

# The end of errors about a tensor on the meta device.
UNLOADED = (
    "without numbers: load it, or take accelerate's offload away first "
    "(accelerate.hooks.remove_hook_from_submodules(model))"
)


class Adapted(nn.Module):
    """A module with adapters.  Its state dict is the base module's, with the adapters added."""

    plain_class: type[nn.Module]  # the module's class without adapters
    lora_settings: tuple[str, ...]  # names of attributes that the module has only with adapters
    # The original weights of merged ones, by name: a parameter, or for a packed weight a layer of
    # the base's class that holds it.  None if the original wasn't kept.  Not in the state dict.
    _bases: dict[str, Any]

    def put_back(self, name: str) -> None:
        """Put the original Parameter back: the same bits, and tied again if it was tied."""
        base = self._bases.pop(name)
        if isinstance(base, nn.Module):  # a packed weight: a module can't replace a parameter
            delattr(self, name)
        setattr(self, name, base)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for base in self._bases.values():  # .to(), .cuda() and .half() also change the originals
            if isinstance(base, nn.Module):
                base._apply(fn)
            elif base is not None:
                base.data = fn(base.data)
        return self

    def adapted_weights(self) -> Iterable[tuple[str, "AdaptedWeight"]]:
        """Each adapted weight with its name in this module; the name is "" in a linear layer."""
        raise NotImplementedError

    def adapter_names(self) -> list[str]:
        """The names of every lora_A and lora_B."""
        return [name for _, weight in self.adapted_weights() for name in weight.pair_names()]

    def detach_adapter(self) -> None:
        """Become the plain module again, in place.  Merged weights stay merged."""
        forget(self)
        for name in (*self.adapter_names(), *self.lora_settings, "_bases"):
            delattr(self, name)
        object.__setattr__(self, "__class__", self.plain_class)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        merged = [f"{prefix}{name}" for name in self._bases]
        # A packed weight appears in the state dict as several tensors, under its name.
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
            # No adapter is in the state dict: it is a checkpoint of the base model.
            missing[:] = [key for key in missing if key not in adapters]


class Features(NamedTuple):
    """A weight's sizes in PEFT's terms: lora_A is [experts · r, p], lora_B [q, r · experts].

    A linear layer has one expert, with p = in_features and q = out_features.
    """

    experts: int
    p: int
    q: int

    def shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of lora_A, where the expert is the slowest index, and lora_B (the fastest)."""
        return (self.experts * r, self.p), (self.q, r * self.experts)


class AdaptedWeight:
    """A frozen weight and its adapter: the interface for merging, saving and reports.

    Subclasses are a linear layer itself, and one weight of an experts module.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    scaling: float
    weight: Any
    plain_class: type[nn.Module]  # its module's class without adapters
    why_not_fast: Any = ""  # the reason if no node runs its calls
    adapted_module: Any  # the module that owns the weight; a linear layer is its own
    adapted_name = "weight"  # the weight's name in that module
    adapted_features: Any  # Features
    weight_name: Any = "weight"  # the name of the tensor that stores it, packed or not

    @property
    def shape(self) -> tuple[int, int]:
        """out_features, in_features."""
        return self.adapted_features.q, self.adapted_features.p

    def adapted_output(self) -> Output:
        """The weight, bias and adapter of a call, for reports.

        Raises ValueError if the weight can't be read.
        """
        raise NotImplementedError

    def check_weight(self, name: str) -> None:
        """Raise ValueError unless the weight is a parameter, which can be replaced."""
        raise NotImplementedError

    def merged_weight(self, around: torch.dtype | None = None) -> Tensor:
        """weight + scaling · lora_B lora_A, rounded once, one expert at a time.

        ``around``: the model's dtype, if it has one; the result for a packed weight gets it.
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
        """The names of lora_A and lora_B in the module."""
        return "lora_A", "lora_B"

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product has the layout of the stored weight: lora_B and lora_A here.

        They change places where the weight is stored transposed.
        """
        return self.adapter_pair[1], self.adapter_pair[0]

    def adapted_sum(self, dtype: torch.dtype | None = None) -> Tensor:
        """weight + scaling · lora_B lora_A of all experts, computed under autograd.

        It has the weight's dtype, or ``dtype`` if the weight is packed.
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
        """Raise ValueError unless lora_A and lora_B have the weight's shape, and its device.

        torch adds a meta tensor, which has no numbers, to any other without an error.
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
        """Replace the weight by ``weight``; with ``keep_base``, :meth:`unmerge` can undo it.

        ``requantize``: if the weight was packed, pack the merged one also.  Returns the relative
        error of that packing, 0 for a dense weight.
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
    """A mixin for the class of a linear layer: a subclass derives from this, then from that class.

    It has methods only, no constructor.  :meth:`attach_adapter` sets the attributes.
    """

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
        """Add lora_A and lora_B, and freeze weight and bias.  Checks nothing."""
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
        """The output of a merged layer for x."""
        return super().forward(x)

    def read(self) -> Record:
        """The record of a layer that isn't merged."""
        return Record("", (self.adapted_output(),), (self.lora_dropout,))

    def run(self, x: Tensor, record: Record) -> tuple[Tensor, Call | None]:
        """The output for x, and the call's kind if later calls may reuse it."""
        (dropout,) = record.dropouts
        (y,), call = linears(x, record.outputs, dropout, self.training)
        return y, call

    def adapted_output(self) -> Output:
        return self.output_over(tensor_of(self, "weight"))

    def output_over(self, weight: Any) -> Output:
        """The inputs of a call whose weight is this one, [out, in], which may be packed."""
        lora_a, lora_b, bias = [tensor_of(self, name) for name in ("lora_A", "lora_B", "bias")]
        return Output(Base(weight, bias), (Adapter(lora_a, lora_b, self.scaling),))

    def check_weight(self, name: str) -> None:
        reason = why_weight_is_fixed(self, self.weight_name)
        if reason:
            raise ValueError(f"{name} can't be merged or removed: {reason}")

    @property
    def merged(self) -> bool:
        # A look-up by name would take longer in each call.  ``len``, because torch.compile guards a
        # dict's length, but not whether it is empty.
        return len(self._bases) > 0

    def adapted_weights(self) -> Iterable[tuple[str, AdaptedWeight]]:
        return [("", self)]

    def extra_repr(self) -> str:
        out_features, in_features = self.shape
        shape = f"in_features={in_features}, out_features={out_features}"
        settings = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        has_bias = self.bias is not None
        return f"{shape}, bias={has_bias}, {settings}" + (", merged" if self.merged else "")

    __repr__ = nn.Module.__repr__  # replaces Conv1D's


# In the order of Recorder's fields: why_not, read, parts, run_record, run.
_RECORDER = Recorder(
    lambda layer, x: False,
    lambda layer: layer.read(),
    lambda layer: (),
    lambda layer, x, record: layer.run(x, record),
    run_one,
)


def refuse_training(merged: nn.Module) -> None:
    """Raise RuntimeError if a merged layer is called in training."""
    if merged.training and torch.is_grad_enabled():
        raise RuntimeError(
            "this LoRA layer is merged, so its adapter would get no gradient: call "
            "fastlora.unmerge_lora(model) before training, or model.eval() for inference"
        )


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def wide_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of an adapter of at least 32 bits for this weight, which may be packed."""
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
    """New lora_A and lora_B for a weight [out, in], or for a weight of these ``features``.

    They have the weight's dtype, or ``dtype``.  ``init_lora_weights``: True (lora_A
    kaiming-uniform, lora_B zero, so that outputs don't change), "gaussian" (lora_A from N(0, 1/r²),
    lora_B zero), or False (lora_B also random).
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
    """The result of ``run`` while the module has these tensors as parameters.

    They replace parameters of the same names, or stand where a packed weight has no parameter.
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

    Writes to ``merged``, or to a new tensor like the base, and returns it.  The base may be packed.
    It is processed in blocks of rows, so that there is never a wide copy of all of it.
    """
    merged = torch.empty_like(base, requires_grad=False) if merged is None else merged
    wide = torch.promote_types(base.dtype, torch.float32)
    with torch.no_grad(), autocast_off(merged.device.type):
        left, right = left.to(wide), right.to(wide)
        for rows, some in widened(source_of(base), buffer_for(base, wide)):
            merged[rows] = torch.addmm(some, left[rows], right, alpha=scale)
    return merged


def why_weight_is_fixed(layer: nn.Module, name: str = "weight") -> str:
    """Why the tensor ``name`` can't be replaced by another Parameter; "" if it can."""
    if name in layer._parameters or (name != "weight" and name in layer._buffers):
        return ""
    return "its weight is computed (weight_norm, pruning, a parametrization): make that permanent"


def own_name(layer: nn.Module) -> str:
    """The first attribute of this layer whose name a LoRA layer needs itself; "" if none."""
    added = ("lora_A", "lora_B", *LoRALayer.lora_settings, "_bases")
    names = (*added, *vars(LoRALayer), *vars(AdaptedWeight), *vars(Adapted))
    return next((n for n in names if hasattr(layer, n) and not hasattr(nn.Linear, n)), "")
