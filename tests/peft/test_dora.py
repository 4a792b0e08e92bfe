"""What PEFT's DoRA does in a way of its own."""

import pytest
import torch
from peft.helpers import DoraCaching
from peft_models import ROUNDING, assert_runs_the_same, assert_same, inputs, mlp, optimized, up
from torch import nn
from torch._dynamo import config as dynamo_config
from torch.utils.checkpoint import checkpoint


def test_dora_caches_are_used_and_cleared_as_peft_s_are():
    """In evaluation a cached norm is used although B has changed; training clears it."""

    def call(model):
        outputs = []
        with DoraCaching():
            outputs += [model(inputs()), model(inputs())]
            with torch.no_grad():
                up(model).lora_B["default"].weight.mul_(2)
            outputs += [model(inputs()), model.train()(inputs()), model.eval()(inputs())]
        return [*outputs, model(inputs())]

    got = assert_runs_the_same(call, mlp(use_dora=True), fast=12, tolerance=ROUNDING)
    assert not torch.equal(got[2], got[3])  # a stale norm differs from a fresh one


def test_dora_of_one_vector_has_peft_s_shape():
    """PEFT's gain is [1, out], and so is its output for x [in]."""
    theirs = mlp(use_dora=True)
    assert_same(up(optimized(theirs))(inputs()[0, 0]), up(theirs)(inputs()[0, 0]), ROUNDING)


def test_dora_drops_in_a_training_layer_only():
    """Dropout switched on alone (Monte Carlo dropout) does nothing in PEFT's DoRA layer."""
    theirs = mlp(use_dora=True, lora_dropout=0.5)
    ours = optimized(theirs)
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    assert_same(ours(inputs()), theirs(inputs()), ROUNDING)


@pytest.mark.usefixtures("fresh_compiler")
def test_checkpointed_in_a_compiled_whole_graph_it_needs_a_setting_of_torch_s(monkeypatch):
    """PEFT's own needs it, too."""
    layer, x = up(optimized(mlp(use_dora=True))), inputs().requires_grad_()
    run = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False).square().sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="nsafe side effect"):
        run(x)
    monkeypatch.setattr(dynamo_config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(run(x), x)[0], expected)
