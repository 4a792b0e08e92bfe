"""The classes of optimized PEFT layers and gated MLPs.

An optimized layer is the same object with another class, whose forward is fastlora's.
"""

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel as PeftModel
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..formats.bitsandbytes import keep_gradients, repack_again
from ..layers import mlp
from ..layers.classes import Fast, class_over
from ..layers.frozen import WATCHED, read_frozen
from ..layers.guards import LinearRecord, Recorded, call_recorded, fits_weight
from ..layers.int8 import Int8Linear
from ..layers.module_parts import is_hooked, is_replaced, plain_class_of, under
from ..ops.functional import linears
from ..ops.node import run_known_layer
from . import experts
from .dense import MergesDense, has_packed, make_dense
from .mixed import LoraModel, mixed_forward
from .read import adapters_now, parts_of, read, why_not_now
from .tensor_parallel import PARALLEL, Part, is_parallel


class FastLinear(Fast, MergesDense, Recorded):
    """A mixin for PEFT's LoRA layers of linear layers, whose ordinary call is one fused node.

    For DoRA it is two.  PEFT's forward runs where :mod:`.read` gives a reason.  A subclass has the
    name of PEFT's class.  Its only state of its own is the cached record.  So assigning
    ``__class__`` turns PEFT's layer into this one and back.  :func:`fast_kinds` makes subclasses
    for quantized bases.
    """

    dense_class = PeftLinear

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = _fast_call(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y

    # A mixed batch names its adapters and reads them itself.  Other calls use the record.

    def why_not(self, x: object) -> str:
        return why_not_now()

    def read(self) -> LinearRecord:
        names = adapters_now(self)
        if not names:
            return LinearRecord("its adapter is merged, disabled or not active")
        return read(self, names)

    def parts(self) -> list[nn.Module]:
        return parts_of(self)

    def classes(self) -> list[type]:
        return [DoraLinearVariant] if self.lora_variant else []

    def run_new(self, x: Tensor, record: LinearRecord) -> tuple[Tensor | None, Any]:
        if record.output is None or not fits_weight(x, record.output.base.weight):
            return None, None
        return fast_forward(x, record)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base for PEFT's ``unload`` and ``merge_and_unload``; never in 8 bits (rotated).

        A vendor's base is quantized again by PEFT's own merge, or is dense where PEFT has none.
        """
        layer: Any = self
        if merge and _can_requantize(layer):
            keep_gradients(layer.base_layer)  # PEFT misreads a repacked weight
            plain_class_of(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)
            repack_again(layer.base_layer)
        elif merge:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif isinstance(layer.base_layer, Int8Linear):
            make_dense(layer)
        return layer.get_base_layer()

    def read_head(self) -> LinearRecord:
        """The record of a layer that is a model's head (:mod:`fastlora.peft.head`)."""
        layer: Any = self
        if layer.merged and layer.disable_adapters:  # PEFT unmerges it in the call
            return LinearRecord("its adapter is merged and disabled")
        if not adapters_now(layer):
            return read_frozen(layer.base_layer)
        return _of_one_rank(self.read())

    forward.__qualname__ = "Linear.forward"  # Python's errors of wrong arguments read as PEFT's


class Linear(FastLinear, PeftLinear):
    """PEFT's LoRA layer of a dense linear layer, with a fast forward."""

    plain_class = PeftLinear


# Where PEFT defines its layers with quantized bases.  Some exist only with the vendor's package.
_QUANTIZED = {
    "peft.tuners.lora.bnb": ("Linear4bit", "Linear8bitLt"),
    "peft.tuners.lora.torchao": ("TorchaoLoraLinear",),
    "peft.tuners.lora.hqq": ("HqqLoraLinear",),
    "peft.tuners.lora.gptq": ("GPTQLoraLinear",),
    "peft.tuners.lora.awq": ("AwqLoraLinear",),
}


def _can_requantize(layer: Any) -> bool:
    """Whether PEFT's own merge can quantize the layer's merged weight again."""
    kind = plain_class_of(layer)
    is_known = getattr(layer, "get_apply_tensor_subclass", True) is not None  # torchao's settings
    return kind is not PeftLinear and "merge" in vars(kind) and is_known and not has_packed(layer)


def _fast_call(layer: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
    """The output of a layer's forward; None if PEFT's forward must run."""
    if not args and not kwargs:
        return call_recorded(layer, x)
    if not args and kwargs.keys() == {"adapter_names"} and not why_not_now():
        return mixed_forward(layer, x, kwargs["adapter_names"])
    return None


def _of_one_rank(record: LinearRecord) -> LinearRecord:
    """The record for a caller that runs no :class:`.tensor_parallel.Part`."""
    return LinearRecord(PARALLEL) if isinstance(record.variant, Part) else record


def fast_forward(x: Tensor, record: LinearRecord) -> tuple[Tensor, Any]:
    """fastlora's output for x, and the function for known calls (:meth:`Recorded.run_new`)."""

    def run(x: Tensor) -> tuple[Tensor, Any]:
        if record.variant is not None:
            return record.variant.run(x, record)
        (y,), call = linears(x, record.outputs, max(record.dropouts))
        return y, None if call is None else partial(run_known_layer, call=call)

    (packed,) = record.packed
    return run(x) if packed is None else packed.run(x, run)


def fast_kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """The fast class for each of PEFT's classes that is imported."""
    places = [(sys.modules.get(place), names) for place, names in _QUANTIZED.items()]
    quantized = [getattr(module, name, None) for module, names in places for name in names]
    return {
        PeftLinear: Linear,
        **experts.KINDS,
        PeftModel: LoraModel,  # the module around all layers
        **{kind: class_over(FastLinear, kind, "") for kind in quantized if kind is not None},
    }


def why_not_swapped(layer: nn.Module) -> str:
    """Why this layer can't become fast, or why nothing would call its fast forward; or ""."""
    # PEFT's classes, and the fast classes that they become.
    kinds: list[Any] = [kind for pair in fast_kinds().items() for kind in pair]
    kind: Any = under(type(layer))
    if getattr(kind, "lazy_over", kind) not in kinds:
        return f"only PEFT's lora.Linear is sped up, not {type(layer).__name__}"
    replaced = is_replaced(layer, [kind.forward for kind in kinds])
    return "its forward was replaced on the instance" if replaced else ""


def fast_classes(modules: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """The fast class of each supported layer of PEFT that doesn't have it yet."""
    layers = [layer for layer in modules if not isinstance(layer, Fast)]
    kinds = fast_kinds()
    return {layer: kinds[under(type(layer))] for layer in layers if not why_not_swapped(layer)}


class PeftGatedMLP(mlp.GatedMLP):
    """A gated MLP of an optimized model.  Its layers are PEFT's, or have no adapter."""

    def why_not_now(self) -> str:
        # In each call, because reading gate and up before down gives the reason takes longer.
        parallel = is_parallel(self._modules.get(mlp.PARTS[0]))
        return why_not_now() or (f"its gate_proj: {PARALLEL}" if parallel else "")

    def parts_of(self, module: nn.Module) -> list[nn.Module]:
        return parts_of(module) if isinstance(module, LoraLayer) else []

    def read_part(self, linear: nn.Module) -> LinearRecord:
        """Read gate, up or down; a reason if the layer's own call wouldn't be fast."""
        if not isinstance(linear, LoraLayer):
            return read_frozen(linear)
        reason = why_not_swapped(linear)
        if not reason and not isinstance(linear, FastLinear):
            reason = "it isn't optimized"
        if not reason and is_hooked(linear):
            reason = WATCHED
        if reason:
            return LinearRecord(reason)
        record = _of_one_rank(linear.read())
        return record if record.variant is None else LinearRecord("it is DoRA")
