"""Optimizes every model that PEFT puts LoRA layers into, and counts the calls of these layers.

Calls inside torch.compile are not counted, because a counter would change the compiled code.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FAST = "fast"


def optimize_and_count(**settings: Any) -> Counter:
    """Start optimizing, with these settings, and counting, in this process.

    Returns the counter: FAST, and the reasons of calls that ran PEFT's forward.  Raises
    RuntimeError if a plain optimized layer doesn't run fast: then nothing would be compared.
    """
    from peft.tuners import lora

    from fastlora.integrations import patches
    from fastlora.layers import module_parts as members
    from fastlora.ops import few_rows
    from fastlora.peft.layer import FastLinear

    members._SAME = *members._SAME, __name__  # the counters below are no patches of a forward
    few_rows.MOST_ROWS = 0  # tiny models have few rows, which run PEFT's forward in training
    counter: Counter = Counter()
    if not isinstance(optimized_layer(), FastLinear):
        raise RuntimeError(
            "fastlora.optimize didn't change a plain lora.Linear: install a PEFT that it supports "
            "(make suites runs with the packages of .venv)"
        )
    for layer_class in classes_with_forward(lora.LoraLayer):
        count(layer_class, lambda layer, arguments: own_call(counter, layer, arguments))
    count(FastLinear, lambda layer, arguments: counter.update([FAST]))
    count_blocks(counter)
    optimized_layer()(torch.ones(1, 4))
    if counter != {FAST: 1}:
        raise RuntimeError(f"a call of a plain layer, optimized, wasn't fast: {dict(counter)}")
    counter.clear()
    patches.optimize_or_log = patches.optimize_and_log  # an error fails the test
    patches.auto(**settings)
    return counter


def optimized_layer() -> nn.Module:
    import peft

    import fastlora

    model = nn.Sequential(nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
    fastlora.optimize(model)
    return model[0]


def classes_with_forward(base: type) -> list[type]:
    """The classes of PEFT's LoRA that derive from base and define a forward."""
    found = []
    for child in base.__subclasses__():
        if child.__module__.startswith("peft.tuners.lora.") and "forward" in vars(child):
            found.append(child)
        found += classes_with_forward(child)
    return found


def count(layer_class: type, note: Callable[[nn.Module, dict], None]) -> None:
    """Call ``note`` for every call of that class's forward outside torch.compile."""
    original = layer_class.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        if not torch.compiler.is_compiling():
            note(self, kwargs)
        return original(self, *args, **kwargs)

    layer_class.forward = forward


def count_blocks(counter: Counter) -> None:
    """Count a call of a fused gated MLP as a fast call of each of its LoRA layers."""
    from peft.tuners.lora import LoraLayer

    from fastlora.layers import mlp

    original = mlp.call_recorded

    @functools.wraps(original)
    def call_recorded(block, *rest):
        y = original(block, *rest)
        if y is not None and not torch.compiler.is_compiling():
            parts = [getattr(block, name) for name in mlp.PARTS]
            counter[FAST] += sum(isinstance(part, LoraLayer) for part in parts)
        return y

    mlp.call_recorded = call_recorded


def own_call(counter: Counter, layer: nn.Module, arguments: dict) -> None:
    """Count a call of PEFT's forward, also if a fast layer passed the call to it."""
    from fastlora.peft.layer import FastLinear

    if isinstance(layer, FastLinear):
        counter[FAST] -= 1
    counter[description(layer, arguments)] += 1


def description(layer: nn.Module, arguments: dict) -> str:
    """A readable name of this layer and its state."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    active = [name for name in layer.active_adapters if name in layer.r]
    variants = {
        type(layer.lora_variant[name]).__name__ for name in active if name in layer.lora_variant
    }
    if layer.disable_adapters:
        state = "disabled"
    elif arguments.get("adapter_names"):
        state = "an adapter for each row"
    elif layer.merged:
        state = "merged"
    elif not active:
        state = "no active adapter"
    elif variants:
        state = ", ".join(sorted(variants))
    elif isinstance(layer.base_layer, BaseTunerLayer):
        state = "around another method's layer"
    elif len(active) > 1:
        state = "several active adapters"
    else:
        state = "one active adapter"
    return f"{type(layer).__name__}: {state}"
