"""What an optimised PEFT layer becomes: the same layer with another forward."""

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor

from ...ops import dora_linear, dora_norm, lora_linears
from ...projection import Projection
from .eligibility import (
    active_adapters,
    base_weight,
    rate,
    runs_base_alone,
    why_not_input,
    why_not_layer,
    why_not_now,
)


class Linear(PeftLinear):
    """PEFT's LoRA layer of a linear layer, whose ordinary call is one fused node.

    It has PEFT's name and no state of its own: a PEFT layer becomes one, and ceases to be one, by
    its ``__class__``.  What :mod:`.eligibility` doesn't cover is left to PEFT's forward.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if (
            args
            or kwargs
            or runs_base_alone(self)
            or why_not_now()
            or why_not_layer(self)
            or why_not_input(x, base_weight(self))
        ):
            return super().forward(x, *args, **kwargs)
        return fast_forward(self, x)


def fast_forward(layer: PeftLinear, x: Tensor) -> Tensor:
    """The layer's output by fastlora's ops; the caller has asked whether they cover the call."""
    name, projections = active_adapters(layer)[0], projections_of(layer)
    dropout = layer.lora_dropout[name]
    if name not in layer.lora_variant:
        return lora_linears(x, projections, dropout=rate(dropout))[0]
    weight, lora_a, lora_b, bias, scale = projections[0]
    return dora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        layer.lora_magnitude_vector[name].weight,
        bias=bias,
        scale=scale,
        dropout=dropout if rate(dropout) > 0.0 else None,
        norm=_norm(layer.lora_magnitude_vector[name], name, projections[0]),
    )


def projections_of(layer: PeftLinear) -> list[Projection]:
    """The layer and its active adapters, as the ops take them."""
    bias = layer.base_layer.bias
    projections: list[Projection] = []
    for name in active_adapters(layer):
        lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name]
        scale = layer.scaling[name]
        if lora_b.bias is not None:
            bias = lora_b.bias * scale if bias is None else bias + lora_b.bias * scale
        up = lora_b.weight
        if isinstance(scale, Tensor):  # as PEFT's hotswapping makes it; never read back to the host
            up, scale = up * scale, 1.0
        projections.append(Projection(None, lora_a, up, None, scale))
    projections[0] = projections[0]._replace(weight=base_weight(layer), bias=bias)
    return projections


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
