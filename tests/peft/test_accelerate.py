"""accelerate prepares, hooks, offloads and dispatches optimised models as PEFT's."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft_llama import (
    DATA,
    LAYERS,
    ROUNDING,
    STEPS,
    adamw,
    gradients,
    llama,
    logits,
    result,
    trained,
)
from peft_models import assert_runs_the_same, optimized
from torch import Tensor, nn

import fastlora
from fastlora.peft.baseline import shared_masks

before_and_after = pytest.mark.parametrize("when", ["before", "after"])


def train_accelerated(model: nn.Module, when: str = "never", **settings) -> dict[str, Tensor]:
    """Losses and adapter; ``when`` says when the model is optimised."""
    AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    optimizer = adamw(trained(model).values())
    model, optimizer = prepared(accelerator, when, model, optimizer)
    torch.manual_seed(7)
    losses = []
    with shared_masks(model.train()):
        for _ in range(STEPS):
            with accelerator.accumulate(model):
                loss = model(**DATA).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return result(model, losses)


def prepared(accelerator, when: str, model: nn.Module, *others):
    """What ``accelerator.prepare`` gives; the model is optimised before, after, or never."""
    if when == "before":
        fastlora.optimize(model)
    found = accelerator.prepare(model, *others)
    if when == "after":
        fastlora.optimize(model)
    return found


@before_and_after
def test_accelerate_prepares_before_or_after(when):
    theirs = llama()
    ours = copy.deepcopy(theirs)

    def train(model):
        moment = when if model is ours else "never"
        return train_accelerated(model, moment, gradient_accumulation_steps=2)

    assert_runs_the_same(train, theirs, ours, fast=LAYERS * STEPS, tolerance=ROUNDING)


def base_layers(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.endswith(".base_layer")]


@pytest.fixture(params=["optimized", "hooked"])
def both(request):
    """PEFT's model, and a copy of it that is optimised before it is hooked, or afterwards."""
    theirs = llama()
    return theirs, optimized(theirs) if request.param == "optimized" else copy.deepcopy(theirs)


@pytest.mark.parametrize("moved", ["inputs", "outputs"])
def test_hooks_of_accelerate_on_base_layers(moved, both):
    """One that moves inputs to the layer's device leaves it fast; one that moves outputs can't."""
    theirs, ours = both
    for layer in base_layers(ours):
        hook = AlignDevicesHook(execution_device="cpu", io_same_device=moved == "outputs")
        add_hook_to_module(layer, hook)
    fastlora.optimize(ours)
    fast = LAYERS * (moved == "inputs")
    assert_runs_the_same(gradients, theirs, ours, fast=fast, tolerance=ROUNDING)
    for layer in base_layers(ours):  # and then the other way
        layer._hf_hook.io_same_device = moved != "outputs"
    assert_runs_the_same(gradients, theirs, ours, fast=LAYERS - fast, tolerance=ROUNDING)


def test_of_a_dispatched_model_only_offloaded_layers_are_peft_s(both, tmp_path):
    theirs, ours = both
    inner = "base_model.model."
    places = {f"{inner}model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"{inner}lm_head": "cpu", f"{inner}model.layers.0": "cpu"}
    places |= {f"{inner}model.layers.1": "disk"}
    accelerate.dispatch_model(ours, places, offload_dir=str(tmp_path))
    report = fastlora.optimize(ours)
    assert all(".layers.0." in layer.name for layer in report.fast)
    assert all(".layers.1." in layer.name for layer in report.eager)
    assert len(report.fast) == LAYERS // 2
    assert_runs_the_same(logits, theirs, ours, fast=LAYERS // 2, tolerance=ROUNDING)
