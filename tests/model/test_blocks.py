"""Gated MLPs of one's own model as blocks: apply_lora takes them, remove_lora gives them back."""

import pickle

import torch
from fast_calls import blocks
from models import adapt, refused, tiny_llama

import fastlora
from fastlora import LoRAConfig

IDS = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(5))
MLPS = {"model.layers.0.mlp", "model.layers.1.mlp"}
CONFIG = LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.1)


def llama(dtype=torch.float64, **settings):
    torch.manual_seed(1)
    return adapt(tiny_llama(dtype), target_modules="all-linear", **settings).train()


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


def test_blocks_false_leaves_them_alone():
    model = fastlora.apply_lora(tiny_llama(), CONFIG, blocks=False)
    assert not blocks(model)
    plain = tiny_llama()
    with refused(plain, "blocks is 1, but must be True or False"):
        fastlora.apply_lora(plain, CONFIG, blocks=1)
