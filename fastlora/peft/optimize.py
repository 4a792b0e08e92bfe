"""PEFT models sped up in place, and back; the report on any model.

This file imports nothing of PEFT.
"""

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import nn

from ..layers import mlp
from ..layers.experts import PackedWeight
from ..layers.frozen import give_back_frozen, take_frozen
from ..layers.modules import has_sharded, lora_layers, plain_name, unwrap
from ..projection import check_switch
from ..report import (
    EAGER,
    IN_THE_CALL,
    BlockCoverage,
    Coverage,
    LayerCoverage,
    cover_frozen,
    cover_lora_linears,
    left_out_notes,
)
from . import is_disabled, untested, why_not_peft, why_nothing_changes

_PASSED_OVER = (
    "PEFT's target_parameters passes them over with a warning; fastlora.apply_lora, on the model "
    "before PEFT has it, gives them adapters"
)


def coverage(model: nn.Module) -> Coverage:
    """How every LoRA layer of the model, fastlora's or PEFT's, would run now; nothing is called.

    Raises TypeError for what is no module, ValueError if ``FASTLORA_BACKEND`` names no backend.
    """
    inner = checked(model)
    unreached = "not optimized yet: fastlora.optimize(model) does it"
    theirs = cover(model, peft_layers(inner), unreached)
    layers = (*cover_lora_linears(inner), *theirs.layers)
    blocks = cover_blocks(inner, unreached)
    return Coverage(layers, theirs.notes, cover_frozen(inner), blocks)


def cover(model: nn.Module, layers: list[tuple[str, Any]], unreached: str) -> Coverage:
    """The report on PEFT layers; ``unreached`` is what stops one that isn't optimized, if any."""
    notes = left_out_notes(model)
    if not layers:
        return Coverage((), notes)
    version = why_not_peft()
    if version:
        eager = []
        for name, layer in layers:  # as little is read as can be
            shape = getattr(layer, "out_features", 0), getattr(layer, "in_features", 0)
            eager.append(LayerCoverage(name, shape, 0, False, EAGER, version))
        return Coverage(tuple(eager), notes)
    from .mixed import mixed_notes
    from .records import records, wrapping_notes

    parts = [module.children() for module in model.modules()]
    count = sum(any(isinstance(each, PackedWeight) for each in inside) for inside in parts)
    packed = f"{count} modules of experts are packed: {_PASSED_OVER}" if count else ""
    first = filter(None, [untested(), packed])
    said = (*first, *notes, *wrapping_notes(layers), *mixed_notes(layers))
    return Coverage(records(model, layers, unreached), said)


def peft_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every LoRA layer of PEFT's, with its name.  Where PEFT isn't imported, there are none."""
    lora = sys.modules.get("peft.tuners.lora")
    kind = getattr(lora, "LoraLayer", ())
    return [(plain_name(name), m) for name, m in model.named_modules() if isinstance(m, kind)]


def checked(model: nn.Module) -> nn.Module:
    """What is inside the wrappers of a model; a TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    return unwrap(model)


def cover_blocks(model: nn.Module, unreached: str) -> tuple[BlockCoverage, ...]:
    """How every gated MLP would run that is a block, or has adapters, if it were called now.

    ``unreached`` is what is said of one that could be a block and isn't.
    """
    blocks_found = []
    for name, module in model.named_modules():
        if isinstance(module, mlp.GatedMLP):
            reason = mlp.why_not_block(module) or module.why_not_now()
            if not reason:
                reason = IN_THE_CALL if has_sharded(module) else module.read().reason
        elif mlp.looks_gated(module) and any(hasattr(m, "lora_A") for m in module.children()):
            reason = mlp.why_not_block(module) or unreached
        else:
            continue
        blocks_found.append(BlockCoverage(plain_name(name), not reason, reason))
    return tuple(blocks_found)


@dataclass(frozen=True)
class Optimized(Coverage):
    """What ``optimize`` returns: the report; as a context manager it undoes that call at its end.

    Layers that were optimized before stay so.
    """

    _changed: tuple[Any, ...] = field(default=(), repr=False, compare=False)  # weak references

    def __enter__(self) -> "Optimized":
        return self

    def __exit__(self, *exception: object) -> None:
        _unswap([layer for changed in self._changed if (layer := changed()) is not None])

    def __reduce__(self):
        return Coverage, (self.layers, self.notes, self.frozen, self.blocks)


def optimize(
    model: nn.Module, *, strict: bool = False, frozen: bool = True, blocks: bool = True
) -> Optimized:
    """Run the PEFT LoRA layers of ``model`` through fastlora, in place, and report on each.

    ``model`` is a PeftModel, or any module that holds PEFT's LoRA layers, wrapped (DDP, FSDP2,
    ``torch.compile``) or not.  Parameters, names, files and PEFT's own functions stay as they are;
    every call decides for itself whether it runs fast, and PEFT's forward takes all the others.
    Layers that were optimized before are left alone; layers that PEFT adds later need another call.
    :func:`restore` undoes it, and so does the end of ``with fastlora.optimize(model):``.

    On a CPU that multiplies 16 bits slowly, so do the model's frozen ``torch.nn.Linear`` layers of
    16 bits (the head, and what no adapter is on; a base, in calls without its adapter), which the
    report lists apart; ``frozen=False`` leaves them alone.

    Gated MLPs of transformers' models, down(act(gate(x)) · up(x)), become blocks: a call in
    training keeps neither act(gate) nor the product for the backward (docs/blocks.md).  The report
    lists them, too; ``blocks=False`` leaves them alone.

    The results are PEFT's within its own rounding; dropout draws other masks of the same kind.

    ``FASTLORA_DISABLE=1`` in the environment makes this change nothing.  So does, with a warning, a
    PEFT that is older than the tested versions.  A newer one is sped up, with a warning and a note
    in the report: :func:`fastlora.check` says whether the numbers are the same.

    Raises TypeError for what is no module, and ValueError for a model without PEFT LoRA layers, for
    a switch that is no bool, or if ``FASTLORA_BACKEND`` names no backend.
    With ``strict``, a layer that would not run fast is a ValueError too, with the report as its
    text.  After an error the model is as it was.
    """
    inner = checked(model)
    check_switch("strict", strict)
    check_switch("frozen", frozen)
    check_switch("blocks", blocks)
    layers = peft_layers(inner)
    if not layers:
        raise ValueError(_why_nothing(inner))
    reason = why_nothing_changes()
    if reason and not is_disabled():
        warnings.warn(f"fastlora.optimize changed nothing: {reason}", stacklevel=2)
    elif untested() and not reason:
        warnings.warn(untested(), stacklevel=2)
    report = cover(model, layers, unreached=reason)
    if strict and report.eager:
        raise ValueError(f"not every layer would run fast: {report}")
    changed: list[nn.Module] = []
    if not reason:
        from .layer import PeftGatedMLP, swap_all  # here, since it imports PEFT

        changed += swap_all(inner.modules())
        # Not those of adapters: one that isn't active is frozen, too, and its layer reads it.
        named = inner.named_modules() if frozen else ()
        changed += take_frozen(layer for name, layer in named if ".lora_" not in name)
        changed += mlp.take(inner.modules(), PeftGatedMLP) if blocks else []
    covered = cover_blocks(inner, reason or "left alone (blocks=False)")
    changed_refs = tuple(map(ref, changed))
    return Optimized(report.layers, report.notes, cover_frozen(inner), covered, changed_refs)


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`optimize`: every layer runs PEFT's or torch's forward again.  Returns the model.

    A model that wasn't optimized stays as it is.  Raises TypeError for what is no module.
    """
    _unswap(list(checked(model).modules()))
    return model


def _unswap(layers: list[nn.Module]) -> None:
    give_back_frozen(layers)
    mlp.give_back(layers)
    if "fastlora.peft.layer" in sys.modules:  # else no layer was ever made fast
        from .layer import unswap_all

        unswap_all(layers)


def _why_nothing(model: nn.Module) -> str:
    """Why a model without PEFT LoRA layers can't be optimized, and what to do."""
    if any(True for _ in lora_layers(model)):
        return f"this {type(model).__name__} needs none: its LoRA layers are fastlora's own"
    config = getattr(model, "peft_config", None)
    if isinstance(config, dict):
        kinds = ", ".join(str(getattr(c, "peft_type", c)).split(".")[-1] for c in config.values())
        return f"this PEFT model has no LoRA layers (its adapters: {kinds}): only LoRA is sped up"
    absent = "" if "peft" in sys.modules else " (pip install 'fastlora-kernels[peft]')"
    return (
        f"this {type(model).__name__} has no PEFT LoRA layers: give it some by "
        f"peft.get_peft_model(model, peft.LoraConfig(…)){absent}, or use fastlora's own layers: "
        "fastlora.apply_lora(model, fastlora.LoRAConfig(…))"
    )
