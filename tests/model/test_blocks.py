"""Gated MLPs of one's own model as blocks: apply_lora takes them, remove_lora gives them back."""

import copy
import pickle

import pytest
import torch
from block_calls import blocks, counted_blocks
from models import adapt, assert_untouched, refused, snapshot, tiny_llama

import fastlora
from fastlora import LoRAConfig
from fastlora.backends import find_backend

IDS = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(5))
MLPS = {"model.layers.0.mlp", "model.layers.1.mlp"}
CONFIG = LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.1)


def llama(dtype=torch.float64, **settings):
    torch.manual_seed(1)
    return adapt(tiny_llama(dtype), target_modules="all-linear", **settings).train()


def layer_by_layer(model):
    model = copy.deepcopy(model)
    fastlora.layers.mlp.give_back(model.modules())
    return model


def steps(model, count=3):
    """The losses of a training, and what has trained."""
    torch.manual_seed(7)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=5e-3), []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [torch.stack(losses), *parameters]


def assert_close(found, expected, tolerance):
    for our, their in zip(found, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
def test_training_is_that_of_the_layers(p):
    model = llama(lora_dropout=p)
    plain = layer_by_layer(model)
    with counted_blocks() as calls:
        found = steps(model)
    assert len(calls) == 6
    assert_close(found, steps(plain), 1e-9)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_on_each_backend(backend):
    model = llama(torch.float32, lora_dropout=0.1)
    plain = layer_by_layer(model)
    with fastlora.use_backend(backend):
        assert find_backend().__name__.endswith(backend)
        found = loss_and_gradients(model)
    for our, their in zip(found, loss_and_gradients(plain), strict=True):
        size = their.abs().max().item()
        torch.testing.assert_close(our, their, rtol=0, atol=1e-4 * size)


def loss_and_gradients(model):
    """No step: AdamW's has one size even for a gradient that is all rounding."""
    torch.manual_seed(7)
    loss = model(input_ids=IDS[:1], labels=IDS[:1]).loss
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters() if p.requires_grad]]


def test_the_report_and_a_pickle():
    model = llama()
    assert blocks(model) == MLPS
    report = fastlora.coverage(model)
    assert str(report) == "14 of 14 layers fast (backend torch)\n2 of 2 gated MLPs as one block"
    other = pickle.loads(pickle.dumps(model))
    assert fastlora.coverage(other) == report
    assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)


def test_remove_lora_gives_them_back():
    model = tiny_llama()
    before = snapshot(model)
    fastlora.apply_lora(model, CONFIG)
    assert blocks(model) == MLPS
    assert_untouched(fastlora.remove_lora(model), before)


def test_blocks_false_leaves_them_alone():
    model = fastlora.apply_lora(tiny_llama(), CONFIG, blocks=False)
    assert not blocks(model)
    plain = tiny_llama()
    with refused(plain, "blocks is 1, but must be True or False"):
        fastlora.apply_lora(plain, CONFIG, blocks=1)


def test_a_refused_config_takes_none():
    model = tiny_llama()
    with refused(model, "no_such"):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["no_such"]))


def test_files(tmp_path):
    model = llama().eval()
    fastlora.save_adapter(model, tmp_path)
    other = tiny_llama(torch.float64)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    fastlora.load_adapter(other, tmp_path)
    assert blocks(other) == MLPS
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_merged_layers_are_called_one_by_one():
    model = llama().eval()
    before = model(IDS).logits
    fastlora.merge_lora(model)
    with counted_blocks() as calls:
        assert_close([model(IDS).logits], [before], 1e-9)
    assert not calls
    assert "its gate_proj: it is merged" in str(fastlora.coverage(model))
    fastlora.unmerge_lora(model)
    with counted_blocks() as calls:
        model(IDS)
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_checkpointing(reentrant):
    model = llama(lora_dropout=0.1)
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(steps(model, 2), steps(plain, 2), 1e-9)


def test_compiled_without_a_graph_break():
    model = llama()
    expected = layer_by_layer(model)(input_ids=IDS, labels=IDS).loss
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=IDS, labels=IDS).loss, expected)
    torch.compiler.reset()
