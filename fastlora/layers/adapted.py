"""LoRALayer: a linear layer of any class with an adapter beside its frozen weight.

:class:`Adapted` is any module with adapters: its state dict, merged weights, removal of adapters.
:class:`.adapted_weight.AdaptedWeight` is one frozen weight of such a module, with its adapter.
A :class:`LoRALayer` is both.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Call
from ..ops.functional import linears
from ..ops.run import run_one
from ..projection import Adapter, Base, Output
from .adapted_weight import AdaptedWeight, Features, Pair, scaling_of
from .classes import change_class
from .guards import Record, Recorder, call_recorded
from .members import tensor_of


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

    def adapted_weights(self) -> Iterable[tuple[str, AdaptedWeight]]:
        """Each adapted weight with its name in this module; the name is "" in a linear layer."""
        raise NotImplementedError

    def adapter_names(self) -> list[str]:
        """The names of every lora_A and lora_B."""
        return [name for _, weight in self.adapted_weights() for name in weight.pair_names()]

    def detach_adapter(self) -> None:
        """Become the plain module again, in place.  Merged weights stay merged."""
        for name in (*self.adapter_names(), *self.lora_settings, "_bases"):
            delattr(self, name)
        change_class(self, self.plain_class)

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


class LoRALayer(AdaptedWeight, Adapted):
    """A mixin for linear layers: :func:`class_over` derives from this class and the layer's.

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
        self, adapter: Pair, lora_alpha: float, lora_dropout: float, use_rslora: bool
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

    def read_head(self) -> Record:
        """The record of a layer that is a model's head (:mod:`fastlora.layers.head`)."""
        if self.merged:
            return Record("its adapter is merged")
        return self.read_in_mode()

    def read_in_mode(self) -> Record:
        """The record, without dropout in evaluation."""
        record = self.read()
        return record if self.training else record._replace(dropouts=(0.0,))

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
        if reason := why_weight_is_fixed(self, self.weight_name):
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
