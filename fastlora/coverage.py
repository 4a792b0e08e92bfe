"""Which layers run fast, and why the others don't."""

from dataclasses import dataclass

from torch import nn

from .backends import backend_name
from .inject import lora_layers, unwrap


@dataclass(frozen=True)
class LayerCoverage:
    """One adapted layer: ``plan`` is what its next call runs on, ``reason`` why it isn't fast."""

    name: str
    shape: tuple[int, int]  # out_features, in_features
    r: int
    fast: bool
    plan: str
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """A record for each adapted layer; prints as a short report."""

    layers: tuple[LayerCoverage, ...]

    @property
    def fast(self) -> tuple[LayerCoverage, ...]:
        return tuple(layer for layer in self.layers if layer.fast)

    @property
    def eager(self) -> tuple[LayerCoverage, ...]:
        return tuple(layer for layer in self.layers if not layer.fast)

    def __str__(self) -> str:
        if not self.layers:
            return "no LoRA layers: fastlora.apply_lora(model, config) makes them"
        plans = ", ".join(sorted({layer.plan for layer in self.fast}))
        lines = [
            f"{len(self.fast)} of {len(self.layers)} layers fast"
            + (f" (backend {plans})" if plans else "")
        ]
        reasons: dict[str, list[str]] = {}
        for layer in self.eager:
            reasons.setdefault(layer.reason, []).append(layer.name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"{len(names)} eager: {shown}: {reason}")
        return "\n".join(lines)


def coverage(model: nn.Module) -> Coverage:
    """How every LoRALinear of the model would run if it were called now; nothing is called."""
    return Coverage(tuple(_cover(name, layer) for name, layer in lora_layers(unwrap(model))))


def _cover(name: str, layer) -> LayerCoverage:
    shape = (layer.out_features, layer.in_features)
    if "forward" in layer.__dict__:
        reason = "its forward was replaced on the instance, so fastlora's isn't called"
        return LayerCoverage(name, shape, layer.r, False, "eager", reason)
    plan = "merged" if layer.merged else backend_name()
    return LayerCoverage(name, shape, layer.r, True, plan)
