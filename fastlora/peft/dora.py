"""The variant of a PEFT layer with DoRA: two nodes (:mod:`fastlora.ops.dora`)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from peft.tuners.lora import dora
from torch import Tensor, nn

from ..call.projection import Adapter, Layout, Output, layouts_of, unflatten
from ..layers.guards import LinearRecord
from ..ops.dora import Calls, dora_norm, run_dora

# PEFT's cache, active inside of DoraCaching in evaluation.  PEFT 0.18 has none.
_cached: Any = getattr(dora, "cache_decorator", lambda key: lambda norm: norm)


class Dora(NamedTuple):
    """A layer's only adapter is DoRA."""

    magnitude: dora.DoraLinearLayer
    drop: nn.Module
    adapter: str  # the adapter's name

    def run(self, x: Tensor, record: LinearRecord) -> "tuple[Tensor, DoraCall | None]":
        """The layer's output for x, and the call's kind, if it can be cached."""
        (output,), p = record.outputs, max(record.dropouts)
        new = DoraCall(self, layouts_of(record.outputs), p)
        y, calls = new.y(x, output)
        is_known = calls[0] is not None and (p == 0.0 or calls[1] is not None)
        return y, new._replace(calls=calls) if is_known else None


class DoraCall(NamedTuple):
    """The settings of a DoRA layer's call, without the tensors that its guard locates."""

    variant: Dora
    layouts: tuple[Layout, ...]
    p: float
    calls: Calls = (None, None)

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """y of a call of this kind; ``inputs`` are x and the flat tensors of the layer."""
        (output,) = unflatten(inputs[1:], self.layouts)
        return self.y(inputs[0], output)[0]

    def y(self, x: Tensor, output: Output[Tensor]) -> tuple[Tensor, Calls]:
        (magnitude, drop, name), (weight, _), (adapter,) = self.variant, *output
        norm = _norm(magnitude, weight, adapter, adapter_name=name)
        drops = drop if self.p > 0.0 else None
        y, calls = run_dora(x, output, magnitude.weight / norm, drops, self.p, self.calls)
        # PEFT multiplies by a gain [1, N], so its output for a single row x [K] is [1, N] also.
        return y if x.dim() > 1 else y.unsqueeze(0), calls


@_cached("weight-norm")
def _norm(
    magnitude: dora.DoraLinearLayer, weight: Tensor, adapter: Adapter[Tensor], *, adapter_name: str
) -> Tensor:
    """The norms of the rows of a DoRA layer's weight."""
    return dora_norm(weight, *adapter)
