"""Which layers run fast, and why the others don't."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from .backends import planned_backend
from .modules import lora_layers, some
from .projection import as_outputs

_BASE_ALONE = ("merged", "disabled")


@dataclass(frozen=True)
class LayerCoverage:
    """One adapted layer: ``plan`` is what its next call runs on.

    It is a backend's name, ``merged`` or ``disabled`` for the base layer alone, or ``eager``.
    ``reason`` says why it isn't fast, or why it isn't on the backend that was asked for.
    ``adapter`` names a PEFT layer's active adapters; ``r`` is the sum of their ranks.
    """

    name: str
    shape: tuple[int, int]  # out_features, in_features
    r: int
    fast: bool
    plan: str
    reason: str = ""
    adapter: str = ""

    @property
    def runs_adapter(self) -> bool:
        """Whether the call runs an adapter fast, and not the base layer alone."""
        return self.fast and self.plan not in _BASE_ALONE


@dataclass(frozen=True)
class Coverage:
    """A record for each adapted layer; prints as a short report.  ``notes`` are on all of them."""

    layers: tuple[LayerCoverage, ...]
    notes: tuple[str, ...] = ()

    @property
    def fast(self) -> tuple[LayerCoverage, ...]:
        return tuple(layer for layer in self.layers if layer.fast)

    @property
    def eager(self) -> tuple[LayerCoverage, ...]:
        return tuple(layer for layer in self.layers if not layer.fast)

    def __str__(self) -> str:
        if not self.layers:
            return "no LoRA layers: fastlora.apply_lora or peft.get_peft_model makes them"
        plans = Counter(layer.plan for layer in self.fast)
        alone = [f"{plans.pop(plan)} {plan}" for plan in _BASE_ALONE if plan in plans]
        notes = [f"backend {plan}" for plan in sorted(plans)] + alone
        note = f" ({'; '.join(notes)})" if notes else ""
        lines = [f"{len(self.fast)} of {len(self.layers)} layers fast{note}"]
        reasons: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                where = f"on {layer.plan}" if layer.fast else "eager"
                reasons.setdefault((where, layer.reason), []).append(layer.name)
        for (where, reason), names in reasons.items():
            lines.append(f"{len(names)} {where}: {some(names)}: {reason}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def cover_lora_linears(model: nn.Module) -> list[LayerCoverage]:
    """How every LoRALinear of the model would run if it were called now."""
    return [_cover(name, layer) for name, layer in lora_layers(model)]


def _cover(name: str, layer) -> LayerCoverage:
    shape = (layer.out_features, layer.in_features)
    if "forward" in layer.__dict__:
        reason = "its forward was replaced on the instance, so fastlora's isn't called"
        return LayerCoverage(name, shape, layer.r, False, "eager", reason)
    if layer.merged:
        return LayerCoverage(name, shape, layer.r, True, "merged")
    return LayerCoverage(
        name, shape, layer.r, True, *planned_backend(as_outputs([layer.projection()]))
    )
