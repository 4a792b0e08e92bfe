"""The variant of a PEFT layer with DoRA: two nodes (:mod:`fastlora.ops.dora`)."""

from typing import Any, NamedTuple

from peft.tuners.lora import dora
from torch import Tensor, nn

from ..layers.guards import LinearRecord
from ..ops.dora import dora_linear, dora_norm
from ..projection import Adapter

# PEFT's cache, active inside of DoraCaching in evaluation.  PEFT 0.18 has none.
_cached: Any = getattr(dora, "cache_decorator", lambda key: lambda norm: norm)


class Dora(NamedTuple):
    """A layer's only adapter is DoRA."""

    magnitude: dora.DoraLinearLayer
    drop: nn.Module
    adapter: str  # the adapter's name

    def run(self, x: Tensor, record: LinearRecord) -> Tensor:
        """The layer's output for x."""
        ((weight, bias), (adapter,)), p = record.outputs[0], max(record.dropouts)
        lora_a, lora_b, scale = adapter
        y = dora_linear(
            x,
            weight,
            lora_a,
            lora_b,
            self.magnitude.weight,
            bias=bias,
            scale=scale,
            drop=self.drop if p > 0.0 else None,
            p=p,
            norm=_norm(self.magnitude, weight, adapter, adapter_name=self.adapter),
        )
        # PEFT multiplies by a gain [1, N], so its output for a single row x [K] is [1, N] also.
        return y if x.dim() > 1 else y.unsqueeze(0)


@_cached("weight-norm")
def _norm(
    magnitude: dora.DoraLinearLayer, weight: Tensor, adapter: Adapter[Tensor], *, adapter_name: str
) -> Tensor:
    """The norms of the rows of a DoRA layer's weight."""
    return dora_norm(weight, *adapter)
