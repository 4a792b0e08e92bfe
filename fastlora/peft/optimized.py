"""Optimizes PEFT models in place, restores them, and reports on any model.

Importing this file doesn't import PEFT; functions import the modules that need it.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..common.values import check_optimize
from ..formats import bitsandbytes
from ..layers import mlp
from ..layers.classes import Fast, change_classes, own_classes
from ..layers.experts_module import PackedWeight
from ..layers.frozen import frozen_classes
from ..layers.linear import LoRALinear
from ..layers.modules import check_model, has_sharded, plain_name, unwrap
from ..layers.report import (
    IN_THE_CALL,
    PEFT_FORWARD,
    Coverage,
    GatedMLPCoverage,
    LayerCoverage,
    cover_frozen,
    cover_lora_linears,
    left_out_notes,
)
from . import is_disabled, untested, why_not_peft, why_nothing_changes
from .convert_int8 import convert, give_back_dense, notes_of
from .head import ASKED, cover_head, give_back_heads, make_lazy, own_heads
from .learning import doubts, untrained_note
from .targets import peft_layers

_PASSED_OVER = (
    "PEFT's target_parameters passes them over with a warning; fastlora.get_peft_model, or "
    "fastlora.auto(), gives them adapters"
)
_LEFT = "left alone (gated_mlps=False)"


def coverage(model: nn.Module) -> Coverage:
    """How every LoRA layer of the model, fastlora's or PEFT's, would run now; no layer is called.

    Raises TypeError if ``model`` isn't a module, and ValueError if ``FASTLORA_BACKEND`` isn't the
    name of a backend.
    """
    inner = checked(model)
    unreached = why_nothing_changes() or "not optimized yet: fastlora.optimize(model) does it"
    theirs = cover_layers(model, peft_layers(inner), unreached)
    layers = (*cover_lora_linears(inner), *theirs.layers)
    blocks = cover_gated_mlps(inner, unreached)
    return Coverage(layers, theirs.notes, cover_frozen(inner), blocks, cover_head(inner))


def cover_layers(model: nn.Module, layers: list[tuple[str, Any]], unreached: str) -> Coverage:
    """The report on PEFT layers.  ``unreached``: the reason for layers that aren't optimized."""
    notes = left_out_notes(model)
    if not layers:
        return Coverage((), notes)
    if version := why_not_peft():
        unread = []
        for name, layer in layers:  # reads few attributes, because an unknown PEFT may lack others
            shape = getattr(layer, "out_features", 0), getattr(layer, "in_features", 0)
            unread.append(LayerCoverage(name, shape, 0, False, PEFT_FORWARD, version))
        return Coverage(tuple(unread), notes)
    from .mixed import mixed_notes
    from .records import records, wrapping_notes

    adapted = {layer.get_base_layer() for _, layer in layers}
    parts = [module.children() for module in model.modules() if module not in adapted]
    count = sum(any(isinstance(each, PackedWeight) for each in inside) for inside in parts)
    packed = f"{count} modules of experts are packed: {_PASSED_OVER}" if count else ""
    first = filter(None, [untested(), packed])
    others = wrapping_notes(layers) + mixed_notes(layers)
    untrained = filter(None, [untrained_note(layers)])
    doubtful = doubts(unwrap(model), layers)
    said = (*first, *notes, *others, *doubtful, *untrained, *notes_of(unwrap(model), layers))
    return Coverage(records(model, layers, unreached), said)


def checked(model: nn.Module) -> nn.Module:
    """The model inside its wrappers.  Raises TypeError for an object that isn't a module."""
    check_model(model)
    return unwrap(model)


def cover_gated_mlps(model: nn.Module, unreached: str) -> tuple[GatedMLPCoverage, ...]:
    """How every gated MLP that is a ``GatedMLP`` or has adapters would run now.

    ``unreached``: the reason for one that could be a ``GatedMLP`` and isn't.
    """
    blocks_found = []
    for name, module in model.named_modules():
        if isinstance(module, mlp.GatedMLP):
            reason = mlp.why_not_block(module) or module.why_not_now()
            if not reason:
                reason = IN_THE_CALL if has_sharded(module) else module.read().reason
        elif mlp.looks_gated(module) and any(hasattr(m, "lora_A") for m in module.children()):
            # Fast layers mean that optimize has run, with gated_mlps=False.
            is_left = any(isinstance(each, Fast) for each in module.children())
            reason = mlp.why_not_block(module) or (_LEFT if is_left else unreached)
        else:
            continue
        blocks_found.append(GatedMLPCoverage(plain_name(name), not reason, reason))
    return tuple(blocks_found)


def optimize(
    model: nn.Module,
    *,
    strict: bool = False,
    frozen_linears: bool = True,
    gated_mlps: bool = True,
    loss: bool | None = None,
    base: str | None = None,
    int8_from: int = 1024,
) -> nn.Module:
    """Run the PEFT LoRA layers of ``model`` through fastlora, in place, and return the model.

    ``model`` is a PeftModel, or any module that holds PEFT's LoRA layers, wrapped (DDP, FSDP2,
    ``torch.compile``) or not.  Parameters, names, files and PEFT's functions don't change.  Each
    call of a layer checks whether it can run fast; otherwise it runs PEFT's forward.
    :func:`coverage` reports on each layer.  Layers that PEFT adds later need another call of
    ``optimize``.  What an earlier call switched on stays on, such as ``loss``, also without that
    argument; an argument of False switches it off.  :func:`restore` undoes all of it.

    ``frozen_linears``: on a CPU that multiplies 16 bits slowly, also speed up frozen
    ``torch.nn.Linear`` layers of 16 bits: the head, layers without an adapter, and base layers
    while their adapter is disabled.

    ``gated_mlps``: fuse each gated MLP of transformers' models, down(act(gate(x)) · up(x)), into
    one autograd node, which saves neither act(gate) nor the product for the backward
    (docs/blocks.md).

    ``loss``: compute the loss, and its gradients, without logits (docs/loss.md).  The head's calls
    return lazy logits.  ``cross_entropy`` on them needs no memory of their size, and any other
    function gets real logits.  If the head can't do this, a warning gives the reason.

    ``base`` "int8": round the frozen weights of PEFT's dense layers to 8 bits, in place, and
    multiply in 8 bits, forward and backward (docs/quantized.md).  The weights need half of the
    memory of 16 bits, and large layers are faster.  The original weights are lost:
    :func:`restore`, and a merge, give the rounded ones.  A layer stays dense if its weight trains,
    is tied or sharded, or if it has fewer than ``int8_from`` input or output features, because 8
    bits don't make small layers faster; 0 converts all.  The report gives the reasons.  On CPUs
    without VNNI, and for 16-bit models on CPUs with AMX, a warning says that 8 bits are slower.

    The results equal PEFT's within rounding; with ``base``, within the rounding to 8 bits.  Dropout
    draws other masks of the same distribution.

    With ``FASTLORA_DISABLE=1`` in the environment, this function changes nothing.  With a PEFT
    older than the tested versions, it also changes nothing, and warns.  With a newer PEFT, it
    optimizes the model and warns; :func:`fastlora.check` compares the numbers.  If no layer of the
    model can run fast, a warning gives the reasons.  Other warnings name scalings of 0, negative
    lora_dropout, and ranks above both sizes of a layer.

    Raises TypeError if ``model`` isn't a module.  Raises ValueError if the model has no PEFT LoRA
    layers, if a switch isn't a bool, if another argument doesn't fit, or if ``FASTLORA_BACKEND``
    isn't the name of a backend.  With ``strict``, also raises ValueError, whose text is the report,
    if a layer would not run fast.  An error leaves the model unchanged.
    """
    switches: Any = {"frozen_linears": frozen_linears, "gated_mlps": gated_mlps, "loss": loss}
    with ExitStack() as undo:  # because Python's filters may turn a warning into an error
        report = _change(model, undo, base, int8_from, strict=strict, **switches)
        nothing_is_fast = len(report.not_fast) == len(report.layers)
        if nothing_is_fast and not why_nothing_changes():
            warnings.warn(f"fastlora.optimize: no layer runs fast: {report}", stacklevel=2)
        # Without an error, drop the callbacks: pop_all moves them to a stack that nothing closes.
        undo.pop_all()
    return model


@contextmanager
def while_optimized(
    model: nn.Module, base: str | None = None, int8_from: int = 0
) -> Iterator[Coverage]:
    """Optimizes the model within the context, and yields the report; then undoes the changes."""
    switches: Any = {"frozen_linears": True, "gated_mlps": True, "loss": None}
    with ExitStack() as undo:
        yield _change(model, undo, base, int8_from, strict=False, **switches)


def _change(model: nn.Module, undo: ExitStack, base: Any, least: Any, **switches: bool) -> Coverage:
    """Optimize the model; returns the report.  Closing ``undo`` restores classes and bases."""
    inner = checked(model)
    check_optimize(base=base, int8_from=least, **switches)
    layers = peft_layers(inner)
    if not layers:
        raise ValueError(_why_nothing(inner))
    reason = why_nothing_changes()
    if reason and not is_disabled():
        warnings.warn(f"fastlora.optimize changed nothing: {reason}", stacklevel=3)
    elif untested() and not reason:
        warnings.warn(untested(), stacklevel=3)
    report = cover_layers(model, layers, unreached=reason)
    for doubt in doubts(inner, layers) if not reason else ():
        warnings.warn(f"fastlora.optimize: {doubt}", stacklevel=3)
    if switches["strict"] and report.not_fast:
        raise ValueError(f"not every layer would run fast: {report}")
    if not reason:
        from .layer import PeftGatedMLP, fast_classes  # here, because it imports PEFT

        modules = list(inner.modules())
        if False in (switches["frozen_linears"], switches["gated_mlps"], switches["loss"]):
            # An earlier call may have switched it on: begin with the plain classes.
            if was_asked := inner.__dict__.pop(ASKED, False):
                undo.callback(inner.__dict__.__setitem__, ASKED, True)
            if switches["loss"] is None:
                switches["loss"] = was_asked
            # Heads first, because the class of a lazy head is derived from its fast class.
            undo.callback(change_classes, change_classes(own_heads(modules)))
            undo.callback(change_classes, change_classes(own_classes(modules)))
        classes = fast_classes(modules)
        if base is not None:
            convert(inner, layers, classes, least, undo)
            # Again, because the converted bases change the reasons and notes.
            report = cover_layers(model, layers, unreached=reason)
        # Skip lora_A and lora_B.  In an inactive adapter they are also frozen, but their class must
        # stay torch's, because the LoRA layer reads their weights.
        named = inner.named_modules() if switches["frozen_linears"] else ()
        classes |= frozen_classes(layer for name, layer in named if ".lora_" not in name)
        if switches["gated_mlps"]:
            classes |= mlp.gated_classes(modules, PeftGatedMLP)
        undo.callback(change_classes, change_classes(classes))
        for module in inner.modules():
            undo.callback(bitsandbytes.repack_again, module)
            bitsandbytes.keep_gradients(module)
        if switches["loss"]:  # a lazy head is derived from the head's new class
            undo.callback(change_classes, make_lazy(inner))
            undo.callback(inner.__dict__.pop, ASKED, None)
    covered = cover_gated_mlps(inner, reason or _LEFT)
    fast: Any = {"frozen_linears": cover_frozen(inner), "gated_mlps": covered}
    return replace(report, **fast, loss=cover_head(inner))


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`optimize`: every layer runs PEFT's or torch's forward again.  Returns the model.

    Bases in 8 bits become dense, with the rounded values.  Packed experts stay packed, and each of
    their calls makes dense weights.  Dense experts lose their dropout, because PEFT has none.  A
    model that isn't optimized doesn't change.  Raises TypeError if ``model`` isn't a module.
    """
    inner = checked(model)
    modules = list(inner.modules())
    # Heads first, as in _change.
    give_back_heads(modules)
    change_classes(own_classes(modules))
    for module in modules:
        bitsandbytes.repack_again(module)
    give_back_dense(inner, peft_layers(inner))
    return model


def _why_nothing(model: nn.Module) -> str:
    """The error for a model without PEFT LoRA layers, with the next step."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        return f"this {type(model).__name__} needs no optimize: its layers are fastlora's own"
    config = getattr(model, "peft_config", None)
    if isinstance(config, dict):
        kinds = ", ".join(str(getattr(c, "peft_type", c)).split(".")[-1] for c in config.values())
        if kinds == "LORA":
            return (
                "this PEFT model has no LoRA layers any more: merge_and_unload() or unload() took "
                "them away, and the model that they return needs no optimize"
            )
        return f"this PEFT model has no LoRA layers (its adapters: {kinds}): only LoRA is sped up"
    absent = "" if "peft" in sys.modules else " (pip install 'fastlora-kernels[peft]')"
    return (
        f"this {type(model).__name__} has no PEFT LoRA layers: give it some by "
        f"fastlora.get_peft_model(model, peft.LoraConfig(…)){absent}"
    )
