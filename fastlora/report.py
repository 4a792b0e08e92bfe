"""Which layers run fast, and why the others don't."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .backends import planned_backend
from .formats.format import Quantised
from .layers.adapted import LoRALayer
from .layers.frozen import Linear, slow_weight
from .layers.modules import has_sharded, lora_layers, plain_name, some
from .projection import Output, as_outputs

if TYPE_CHECKING:
    from .layers.expert_layer import ExpertsWeight

_BASE_ALONE = ("merged", "disabled")
SHARDED, IN_THE_CALL = "sharded", "decided in the call"  # a plan, and its reason


@dataclass(frozen=True)
class LayerCoverage:
    """One adapted layer: ``plan`` is what its next call runs on.

    It is a backend's name, ``merged`` or ``disabled`` for the base layer alone, ``eager``, or
    ``sharded`` where FSDP has a part of each tensor: the call, which finds them whole, decides.
    ``reason`` says why it isn't fast, or why it isn't on the backend that was asked for.
    ``adapter`` names a PEFT layer's active adapters; ``r`` is the sum of their ranks.
    ``parameters`` is how many of the base's are adapted: out · in, for each expert.
    ``packed`` names the format of a quantised base that is read, as "NF4".
    """

    name: str
    shape: tuple[int, int]  # out_features, in_features
    r: int
    fast: bool
    plan: str
    reason: str = ""
    adapter: str = ""
    parameters: int = 0
    packed: str = ""

    @property
    def runs_adapter(self) -> bool:
        """Whether the call runs an adapter fast, or may, and not the base layer alone."""
        return self.plan == SHARDED or (self.fast and self.plan not in _BASE_ALONE)


@dataclass(frozen=True)
class BlockCoverage:
    """One gated MLP: ``fast`` if a call in training is one block, ``reason`` why it isn't."""

    name: str
    fast: bool
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """A record for each adapted layer; prints as a short report.  ``notes`` are on all of them.

    ``frozen`` names the layers without an adapter that are fast too, where this CPU multiplies
    their 16-bit weights slowly.  ``blocks`` has a record for each gated MLP.
    """

    layers: tuple[LayerCoverage, ...]
    notes: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    blocks: tuple[BlockCoverage, ...] = ()

    @property
    def fast(self) -> tuple[LayerCoverage, ...]:
        return tuple(layer for layer in self.layers if layer.fast)

    @property
    def eager(self) -> tuple[LayerCoverage, ...]:
        return tuple(layer for layer in self.layers if not (layer.fast or layer.plan == SHARDED))

    @property
    def share(self) -> float:
        """Which part of the adapted parameters runs fast, from 0 to 1."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(layer.parameters for layer in self.fast) / total if total else 0.0

    @property
    def counts(self) -> str:
        """How many layers are fast; where only some are, their share of the parameters too."""
        text = f"{len(self.fast)} of {len(self.layers)} layers fast"
        sharded = len(self.layers) - len(self.fast) - len(self.eager)
        if sharded:
            text += f", {sharded} sharded"
        if self.fast and self.eager and any(layer.parameters for layer in self.layers):
            text += f", {_percent(self.share)} of the adapted parameters"
        return text

    def __str__(self) -> str:
        if not self.layers:
            return "no LoRA layers: fastlora.apply_lora or peft.get_peft_model makes them"
        plans = Counter(layer.plan for layer in self.fast)
        alone = [f"{plans.pop(plan)} {plan}" for plan in _BASE_ALONE if plan in plans]
        notes = [f"backend {plan}" for plan in sorted(plans)] + alone
        note = f" ({'; '.join(notes)})" if notes else ""
        lines = [f"{self.counts}{note}"]
        reasons: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                where = f"on {layer.plan}" if layer.fast else layer.plan
                reasons.setdefault((where, layer.reason), []).append(layer.name)
        for (where, reason), names in reasons.items():
            lines.append(f"{len(names)} {where}: {some(names)}: {reason}")
        lines += self._lines_of_packed()
        lines += self._lines_of_blocks()
        if self.frozen:
            lines.append(
                f"{len(self.frozen)} without an adapter: {some(self.frozen)}: in float32, a "
                "block of the weight at a time, since this CPU multiplies 16 bits slowly; "
                "attention in 16 bits stays slow, which a float32 model avoids"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _lines_of_packed(self) -> list[str]:
        formats = Counter(layer.packed for layer in self.layers if layer.packed)
        return [f"{count} quantised: {name}" for name, count in formats.items()]

    def _lines_of_blocks(self) -> list[str]:
        if not self.blocks:
            return []
        count = sum(block.fast for block in self.blocks)
        lines = [f"{count} of {len(self.blocks)} gated MLPs as one block"]
        reasons: dict[str, list[str]] = {}
        for block in self.blocks:
            if block.reason:
                reasons.setdefault(block.reason, []).append(block.name)
        for reason, names in reasons.items():
            where = SHARDED if reason == IN_THE_CALL else "layer by layer"
            lines.append(f"{len(names)} {where}: {some(names)}: {reason}")
        return lines


def format_of(output: Output) -> str:
    """What the format of its packed weight is called; "" for a plain weight."""
    weight = output.base.weight
    return weight.format.label if isinstance(weight, Quantised) else ""


def _percent(share: float) -> str:
    """A whole number; what isn't all doesn't read as all, and what isn't nothing as nothing."""
    if 0.0 < share < 0.01:
        return "under 1 %"
    return "over 99 %" if 0.99 < share < 1.0 else f"{share:.0%}".replace("%", " %")


def cover_lora_linears(model: nn.Module) -> list[LayerCoverage]:
    """How every LoRA layer of the model would run if it were called now."""
    return [_cover(name, layer) for name, layer in lora_layers(model)]


def cover_frozen(model: nn.Module) -> list[str]:
    """The names of the layers without an adapter whose calls are fast now."""
    return [
        plain_name(name)
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and slow_weight(layer) is not None
    ]


def _cover(name: str, layer: "LoRALayer | ExpertsWeight") -> LayerCoverage:
    fast, plan, reason, packed = True, "", "", ""
    module: Any = layer if isinstance(layer, LoRALayer) else layer.experts
    if "forward" in module.__dict__:
        fast, plan = False, "eager"
        reason = "its forward was replaced on the instance, so fastlora's isn't called"
    elif layer.merged:
        plan = "merged"
    elif has_sharded(module):
        fast, plan, reason = False, SHARDED, IN_THE_CALL
    else:
        try:
            own = layer.why_not_fast if isinstance(layer, LoRALayer) else module.read().reason
            if own:
                raise ValueError(own)
            outputs = as_outputs(
                [layer.projection() if isinstance(layer, LoRALayer) else layer.output()]
            )
            (plan, reason), packed = planned_backend(outputs), format_of(outputs[0])
        except ValueError as error:  # of a quantised layer that can't be read, and whose call fails
            fast, plan, reason = False, "eager", str(error)
    return LayerCoverage(
        name,
        shape=layer.shape,
        r=layer.r,
        fast=fast,
        plan=plan,
        reason=reason,
        parameters=layer.adapted_parameters,
        packed=packed,
    )
