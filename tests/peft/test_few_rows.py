"""Few rows on a CPU that drop: PEFT's own forward, with its bits and its masks."""

import copy

import pytest
import torch
from block_calls import counted_blocks
from models import tiny_llama
from peft_models import adapted, counted_calls, optimized
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr("fastlora.ops.way.MOST_ROWS", 32)
    monkeypatch.setattr("fastlora.backends.products.FORCED", False)  # 16 bits are fast


def layer(dtype=torch.float32, **settings) -> nn.Module:
    model = adapted(nn.Sequential(nn.Linear(16, 12)), target_modules=["0"], **settings).to(dtype)
    return model.base_model.model[0].train()


def step(layer: nn.Module, x: torch.Tensor, **how) -> list[torch.Tensor]:
    """The output and every gradient, from the same random state each time."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = checkpoint(layer, x, **how) if how else layer(x)
    y.square().sum().backward()
    found = [y, x.grad, *[p.grad for p in layer.parameters() if p.requires_grad]]
    layer.zero_grad()
    return found


def fast_calls(layer: nn.Module, x: torch.Tensor) -> int:
    with counted_calls() as calls:
        layer(x)
    return len(calls)


@pytest.mark.parametrize("adapters", [("default",), ("a", "b")], ids=len)
def test_a_step_has_peft_s_bits(adapters):
    theirs, x = layer(lora_dropout=0.3, adapters=adapters), torch.randn(4, 8, 16)
    ours = optimized(theirs)
    assert fast_calls(ours, x) == 0
    assert all(map(torch.equal, step(ours, x), step(theirs, x)))
    assert fast_calls(ours, torch.randn(33, 16)) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_drops_the_same_again(reentrant):
    """Reentrant, the first run is without autograd: it must have PEFT's mask, too."""
    ours, x = optimized(layer(lora_dropout=0.3)), torch.randn(8, 16)
    found = step(ours, x, use_reentrant=reentrant)
    assert all(map(torch.equal, found, step(ours, x)))


def test_calls_that_are_fast_nevertheless(wide):
    """Without dropout, in evaluation, DoRA, autocast, another backend, compiled, slow 16 bits."""
    ours, x = optimized(layer(lora_dropout=0.3)), torch.randn(8, 16)
    assert fast_calls(optimized(layer()), x) == 1
    assert fast_calls(copy.deepcopy(ours).eval(), x) == 1
    assert fast_calls(optimized(layer(use_dora=True)), x) == 1
    assert fast_calls(optimized(layer(torch.bfloat16)), x.bfloat16()) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert fast_calls(ours, x) == 1
    with fastlora.use_backend("triton"):
        assert fast_calls(ours, x) == 1
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert compiled(x).shape == ours(x).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_mlp_goes_layer_by_layer(dtype):
    theirs = adapted(tiny_llama(dtype), target_modules="all-linear", lora_dropout=0.1).to(dtype)
    ours, ids = optimized(theirs.train()), torch.randint(0, 100, (2, 16))
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        with counted_blocks() as blocks, counted_calls() as calls:
            losses.append(model(input_ids=ids, labels=ids).loss)
        assert not blocks
        assert not calls
    assert torch.equal(*losses)
    with counted_blocks() as blocks:
        ours(input_ids=torch.randint(0, 100, (2, 17)))
    assert len(blocks) == 2
