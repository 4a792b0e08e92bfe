"""The variant of a PEFT layer with DoRA: two nodes (:mod:`fastlora.ops.dora`)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from peft.tuners.lora import dora
from torch import Tensor, nn

from ..call.projection import Adapter, Layout, Output, layouts_of, unflatten
from ..layers.guards import LinearRecord
from ..ops.dora import Calls, dora_linear, dora_norm

# PEFT's cache, active inside of DoraCaching in evaluation.  PEFT 0.18 has none.
_cached: Any = getattr(dora, "cache_decorator", lambda key: lambda norm: norm)


class Dora(NamedTuple):
    """A layer's only adapter is DoRA."""

    magnitude: dora.DoraLinearLayer
    drop: nn.Module
    adapter: str  # the adapter's name

    def run(self, x: Tensor, record: LinearRecord) -> tuple[Tensor, Any]:
        """The layer's output for x, and the function for known calls."""
        p, layouts = max(record.dropouts), layouts_of(record.outputs)
        y, calls = self._y(x, record.outputs[0], p, (None, None))
        is_known = None not in (calls if p else calls[:1])
        return y, partial(self._known, layouts=layouts, p=p, calls=calls) if is_known else None

    def _known(
        self, inputs: Sequence[Tensor], layouts: Sequence[Layout], p: float, calls: Calls
    ) -> Tensor:
        (output,) = unflatten(inputs[1:], layouts)
        return self._y(inputs[0], output, p, calls)[0]

    def _y(self, x: Tensor, output: Output[Tensor], p: float, calls: Calls) -> tuple[Tensor, Calls]:
        (weight, _), (adapter,) = output
        norm = _norm(self.magnitude, weight, adapter, adapter_name=self.adapter)
        gain, drop = self.magnitude.weight / norm, self.drop if p else None
        y, calls = dora_linear(x, output, gain, drop, p, calls)
        # PEFT multiplies by a gain [1, N], so its output for a single row x [K] is [1, N] also.
        return y if x.dim() > 1 else y.unsqueeze(0), calls


@_cached("weight-norm")
def _norm(
    magnitude: dora.DoraLinearLayer, weight: Tensor, adapter: Adapter[Tensor], *, adapter_name: str
) -> Tensor:
    """The norms of the rows of a DoRA layer's weight."""
    return dora_norm(weight, *adapter)
