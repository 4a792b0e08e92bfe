"""What an optimised PEFT layer becomes: the same layer with another forward."""

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor

from ...ops import dora_linear, dora_norm, lora_linears
from ...projection import Projection
from .moment import why_not_input, why_not_now
from .reading import Reading, active_adapters, read


class Linear(PeftLinear):
    """PEFT's LoRA layer of a linear layer, whose ordinary call is one fused node.

    It has PEFT's name and no state of its own: a PEFT layer becomes one, and ceases to be one, by
    its ``__class__``.  Calls that :mod:`.moment` and :mod:`.reading` don't allow are PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = active_adapters(self)
        alone = self.disable_adapters or self.merged or not names  # the base layer's call
        if not (alone or args or kwargs or why_not_now()):
            reading = read(self, names)
            if not reading.reason and not why_not_input(x, reading.projections[0].weight):
                return fast_forward(x, names[0], reading)
        return super().forward(x, *args, **kwargs)


def fast_forward(x: Tensor, name: str, reading: Reading) -> Tensor:
    """The output for x by fastlora's ops; ``name`` is that of the first active adapter."""
    if reading.magnitude is None:
        return lora_linears(x, reading.projections, dropout=reading.p)[0]
    weight, lora_a, lora_b, bias, scale = reading.projections[0]
    y = dora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        reading.magnitude.weight,
        bias=bias,
        scale=scale,
        dropout=reading.dropout if reading.p > 0.0 else None,
        norm=_norm(reading.magnitude, name, reading.projections[0]),
    )
    return y if x.dim() > 1 else y.unsqueeze(0)  # PEFT's gain is [1, N], and so is this output


def _norm(magnitude: dora.DoraLinearLayer, name: str, projection: Projection) -> Tensor:
    """The rows' norms; kept where PEFT keeps them, if PEFT's DoraCaching is on in evaluation."""
    key = f"weight-norm-{name}"
    keeps = dora.ENABLE_DORA_CACHING and not magnitude.training
    if not keeps:
        magnitude._cache_clear()
    norm = magnitude._cache_get(key, None)
    if norm is None:
        norm = dora_norm(projection.weight, projection.lora_a, projection.lora_b, projection.scale)
        if keeps:
            magnitude._cache_store(key, norm)
    return norm
