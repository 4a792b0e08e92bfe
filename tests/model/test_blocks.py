"""Gated MLPs of one's own model as blocks: apply_lora takes them, remove_lora gives them back."""

import copy
import pickle

import torch
from block_calls import blocks, counted_blocks
from models import adapt, assert_untouched, refused, snapshot, tiny_llama

import fastlora
from fastlora import LoRAConfig

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


def test_training_is_that_of_the_layers():
    model = llama(lora_dropout=0.1)
    plain = layer_by_layer(model)
    with counted_blocks() as calls:
        found = steps(model)
    assert len(calls) == 6
    assert_close(found, steps(plain), 1e-9)


def test_the_report_a_pickle_and_files(tmp_path):
    model = llama()
    assert blocks(model) == MLPS
    report = fastlora.coverage(model)
    assert str(report) == "14 of 14 layers fast (backend torch)\n2 of 2 gated MLPs as one block"
    other = pickle.loads(pickle.dumps(model))
    assert fastlora.coverage(other) == report
    assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)
    fastlora.save_adapter(model, tmp_path)
    again = fastlora.load_adapter(fastlora.remove_lora(other), tmp_path)
    assert blocks(again) == MLPS
    assert torch.equal(again(IDS).logits, model(IDS).logits)


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
