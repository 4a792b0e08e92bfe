"""torch.compile of optimized models, and of models that are optimized afterwards."""

import sys
import types
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_llama import DATA, LAYERS, ROUNDING, adamw, gradients, llama, result, trained
from peft_models import ROUNDING as MLP_ROUNDING
from peft_models import assert_same, counted_ops, inputs, mlp, optimized, write_adapter
from peft_models import gradients as mlp_gradients
from torch import Tensor, nn

import fastlora
from fastlora.peft.baseline import shared_masks

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def train_compiled(
    model: nn.Module, step: Callable, share: bool
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Losses and adapter of 3 steps, and the ops of the last.  Only the first step may compile."""
    torch.manual_seed(7)
    optimizer, losses = adamw(trained(model.train()).values()), []
    for i in range(3):
        with (
            torch._dynamo.config.patch(error_on_recompile=i > 0),
            shared_masks(model) if share else nullcontext(),
            counted_ops() if i == 2 else nullcontext() as ops,
        ):
            loss = step(**DATA).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return result(model, losses), ops


COMPILED = {"dropout": {}, "dora-dropout": {"use_dora": True}}


@pytest.mark.parametrize(("what", "name"), [("model", "dora-dropout"), ("blocks", "dropout")])
def test_a_compiled_model_trains_as_peft_s_in_eager_mode(name, what):
    """No graph break, and one compilation; aot_eager draws the same random numbers as eager mode.

    DoRA applies PEFT's own dropout layer, so it needs no shared masks.
    """
    settings = COMPILED[name]
    theirs = llama(blocks=1, **settings)
    ours = optimized(theirs)
    expected, _ = train_compiled(theirs, theirs, share=name == "dropout")
    options = {"backend": "aot_eager", "fullgraph": True}
    if what == "model":
        got, ops = train_compiled(ours, torch.compile(ours, **options), share=False)
    else:
        for block in ours.base_model.model.model.layers:
            block.compile(**options)
        got, ops = train_compiled(ours, ours, share=False)
    assert_same(got, expected, ROUNDING)
    layers = LAYERS // 2
    # DoRA multiplies the dropped x in a call of its own; the first q, k and v have an x without
    # gradient.
    apart = (layers, layers - 3) if name == "dora-dropout" else (0, 0)
    assert ops.pop("lora_linears") == layers + apart[0]
    assert ops.pop("lora_linears_backward") == layers + apart[1]
    assert ops == ({"dora_norm": layers} if settings.get("use_dora") else {})


def test_check_of_a_compiled_model_that_drops():
    compiled = torch.compile(mlp(lora_dropout=0.3).train(), backend="aot_eager", fullgraph=True)
    assert fastlora.check(compiled, inputs())


def test_checkpointed_blocks_of_a_compiled_model():
    """Checkpointed blocks recompute their fast calls with the same masks."""
    theirs = llama(blocks=1, target_modules=["q_proj", "down_proj"])
    theirs.config.use_cache = False  # otherwise transformers warns, which breaks the graph
    ours = optimized(theirs)
    ours.activation_checkpointing_enable()
    ours.disable_input_require_grads()  # these hooks would also break the graph
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(gradients(compiled), gradients(theirs), ROUNDING)
    with counted_ops() as ops:
        gradients(compiled)
    assert 2 < ops["lora_linears"] <= 4
    assert ops["lora_linears_backward"] == 2


def test_an_import_compiles_nothing_again(monkeypatch):
    """If traced code reads ``sys.modules``, Dynamo guards on the number of modules."""
    compiled = torch.compile(optimized(mlp()), backend="aot_eager", fullgraph=True)
    mlp_gradients(compiled)
    monkeypatch.setitem(sys.modules, "imported_later", types.ModuleType("imported_later"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        mlp_gradients(compiled)


def test_an_adapter_is_swapped_in_a_compiled_model_without_compiling_again(tmp_path):
    folder = write_adapter(tmp_path, r=6, lora_alpha=20)
    theirs = mlp()
    ours = optimized(theirs)
    for model in (theirs, ours):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(compiled(inputs()), theirs(inputs()), MLP_ROUNDING)
    for model in (theirs, ours):
        hotswap_adapter(model, str(folder), "default")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(compiled(inputs()), theirs(inputs()), MLP_ROUNDING)
