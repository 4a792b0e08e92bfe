"""A gated MLP, down(act(gate(x)) ∘ up(x)), as two nodes that save less for the backward.

:func:`gated_classes` gives each module whose forward is known another class.  A forward is known if
it has the same byte code as a function in this file, so the name of its class doesn't matter.  The
module's own forward runs where the nodes can't.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..call.projection import AUTOCAST_DTYPES, HALF_DTYPES, Output
from ..common.other_packages import is_same_code
from ..formats import PackedLayer
from ..ops.dispatch import autocast_dtype, follows, why_not_here
from ..ops.few_rows import has_few_rows
from ..ops.gated_mlp import gated_call, run_gated
from .classes import Fast, class_over
from .frozen import read_frozen
from .guards import Known, LinearRecord, Record, Recorded, call_recorded, fits_weight
from .module_parts import activation_of, is_replaced, plain_class_of

PARTS = ("gate_proj", "up_proj", "down_proj")
_UNKNOWN = "its forward is unknown to fastlora"


# The known forwards, as transformers writes them: Llama's (also Mistral's, Gemma's and most
# others'), Qwen's and RecurrentGemma's.  Their byte code is compared, so don't simplify them.
def _of_llama(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _of_qwen(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _of_recurrent_gemma(self, hidden_states):
    gate = self.act_fn(self.gate_proj(hidden_states))
    return self.down_proj(gate * self.up_proj(hidden_states))


def _is_known(forward: Any) -> bool:
    known = (_of_llama, _of_qwen, _of_recurrent_gemma)
    return any(is_same_code(forward, one) for one in known)


@dataclass(frozen=True)
class GatedRecord(Record):
    """The record of a gated MLP; its outputs are gate, up and down."""

    dropouts: tuple[float, float] = (0.0, 0.0)  # of gate's and up's adapters, and of down's
    activation: str = ""


class GatedMLP(Fast, Recorded):
    """A mixin for gated MLPs: :func:`class_over` derives from this class and the module's.

    An ordinary call in training is two nodes.  They save neither act(gate) nor its product with up
    for the backward.  The class's own forward takes the other calls.
    """

    def forward(self, *args, **named):
        y = None if len(args) != 1 or named else call_recorded(self, args[0])
        return super().forward(*args, **named) if y is None else y

    def why_not(self, x: object) -> bool | str:
        """Why the module's own forward runs with this x; false if the nodes may run.

        Calls without gradients save nothing anyway.  With few rows, reading the module costs more
        than its products.
        """
        return not isinstance(x, Tensor) or not follows(x) or has_few_rows(x) or self.why_not_now()

    def run_new(self, x: Tensor, record: GatedRecord) -> tuple[Tensor | None, Known | None]:
        """See :meth:`Recorded.run_new`."""
        dtypes = _dtypes_of_all(x, record) if record.outputs else None
        if dtypes is None or not fits_weight(x, record.outputs[0].base.weight):
            return None, None
        (gate, up, down), (p, of_down) = record.outputs, record.dropouts
        inside, is_wide = x.to(dtypes.inside), dtypes.inside != dtypes.outside
        y, call = gated_call(inside, gate, up, down, record.activation, p, of_down, is_wide)
        # run_gated casts neither x nor y, so a call with casts isn't reused.
        if call is None or inside is not x or is_wide:
            return y.to(dtypes.outside), None
        return y.to(dtypes.outside), partial(run_gated, call=call)

    def why_not_now(self) -> str:
        """Why the nodes can't run any call at this moment; "" if they can."""
        if nn_module._has_any_global_hook():
            return "a hook on all modules is registered"
        return why_not_here()

    def parts(self) -> list[nn.Module]:
        """The modules that :meth:`read` reads."""
        modules = self._modules
        parts = [m for m in (modules.get("act_fn"), *map(modules.get, PARTS)) if m is not None]
        return [each for module in parts for each in (module, *self.parts_of(module))]

    def parts_of(self, module: nn.Module) -> list[nn.Module]:
        """The modules inside of gate, up or down that :meth:`read` also looks at."""
        return []

    def read(self) -> GatedRecord:
        """Read gate, up, down and the activation."""
        if not _is_known(self.plain_class.forward):
            return GatedRecord(_UNKNOWN)
        activation = activation_of(getattr(self, "act_fn", None))
        if not activation:
            return GatedRecord("its activation is unknown to fastlora, or is hooked or patched")
        parts = []
        for name in PARTS:
            linear = getattr(self, name, None)
            if not isinstance(linear, nn.Module):
                return GatedRecord(f"its {name} is no module")
            part = self.read_part(linear)
            if part.output is None:
                return GatedRecord(f"its {name}: {part.reason}")
            parts.append(part)
        outputs = tuple([output for part in parts for output in part.outputs])
        packed = tuple([layer for part in parts for layer in part.packed])
        reason, p = _why_not_fitting(outputs, packed), [part.dropouts[0] for part in parts]
        if not reason and outputs[0].adapters and outputs[1].adapters and p[0] != p[1]:
            reason = "its gate_proj and up_proj have different dropouts, and are training"
        if reason:
            return GatedRecord(reason)
        # max, because a part without an adapter has dropout 0.
        return GatedRecord("", outputs, packed, (max(p[:2]), p[2]), activation)

    def read_part(self, linear: nn.Module) -> LinearRecord:
        """Read gate, up or down, which has no adapter."""
        return read_frozen(linear)


class _Dtypes(NamedTuple):
    inside: torch.dtype  # the dtype of a layer's computation
    outside: torch.dtype  # the dtype of its output


def _dtypes_of_all(x: Tensor, record: Record) -> _Dtypes | None:
    """The dtypes of gate, up and down in a call with x; None if they differ.

    The nodes compute in one dtype.  None also if a layer rounds in a way that the nodes don't.
    """
    cast = autocast_dtype(x) if x.dtype in AUTOCAST_DTYPES else None
    of_layers = set()
    for output, packed in zip(record.outputs, record.packed, strict=True):
        dtype = output.base.weight.dtype if packed is None else packed.compute_dtype or x.dtype
        inside = cast if cast is not None and dtype in AUTOCAST_DTYPES else dtype
        if packed is not None and dtype not in (inside, x.dtype):
            return None  # the layer rounds twice: to its own dtype, then to another one
        restores = packed is not None and packed.restores
        of_layers.add(_Dtypes(inside, x.dtype if restores else inside))
    if len(of_layers) > 1:
        return None
    (dtypes,) = of_layers
    is_wide = dtypes.inside in HALF_DTYPES and dtypes.outside == torch.float32
    return dtypes if is_wide or dtypes.inside == dtypes.outside else None


def _why_not_fitting(
    outputs: tuple[Output[Tensor], ...], packed: tuple[PackedLayer | None, ...]
) -> str:
    weights = [output.base.weight for output in outputs]
    dtypes = {
        weight.dtype if layer is None else layer.compute_dtype
        for weight, layer in zip(weights, packed, strict=True)
    }
    # A packed layer without a dtype of its own (None) computes in x's.
    if len(dtypes - {None}) > 1 or any(w.device != weights[0].device for w in weights):
        return "its layers have different dtypes, or are on different devices"
    gate, up, down = (weight.shape for weight in weights)
    if gate != up or down[1] != gate[0] or 0 in (*gate, *down):
        return f"its weights have shapes {tuple(gate)}, {tuple(up)} and {tuple(down)}"
    return ""


def why_not_block(module: nn.Module) -> str:
    """Why a module with gate, up and down can't become a :class:`GatedMLP`; "" if it can."""
    kind = plain_class_of(module)
    if not _is_known(kind.forward) or kind.__call__ is not nn.Module.__call__:
        return _UNKNOWN
    replaced = is_replaced(module, (kind.forward, type(module).forward))
    return "its forward was replaced on the instance" if replaced else ""


def gated_classes(
    modules: Iterable[nn.Module], mixin: type[GatedMLP] = GatedMLP
) -> dict[nn.Module, Any]:
    """A class over ``mixin`` for each known gated MLP that has none."""
    gated = [m for m in modules if looks_gated(m) and not isinstance(m, GatedMLP)]
    blocks = [module for module in gated if not why_not_block(module)]
    return {module: class_over(mixin, plain_class_of(module), "") for module in blocks}


def looks_gated(module: nn.Module) -> bool:
    """Whether the module has children gate_proj, up_proj, down_proj.  Doesn't check its forward."""
    return all(name in module._modules for name in PARTS)
