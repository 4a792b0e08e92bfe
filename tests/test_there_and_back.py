"""Every kind of adapted model: copies compute the same, and removing the adapters restores it."""

import copy
import pickle

import pytest
import torch
from changes import State
from model_kinds import KINDS
from models import adapt, assert_untouched, snapshot
from peft_models import adapted
from torch import nn

import fastlora


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


COPIES = {  # a way to copy, and whether the model is merged before
    "deepcopy-merged": (copy.deepcopy, True),
    "pickle": (pickled, False),
    "pickle-merged": (pickled, True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("copied", "merged"), COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same(kind, copied, merged):
    state = State(kind)
    if merged and "peft" in state.words:
        state.model.merge_adapter()
    elif merged:
        fastlora.merge_lora(state.model)
    expected, model = state.numbers(), state.model
    state.model = state.call = copied(model)
    assert [type(module) for module in state.model.modules()] == [*map(type, model.modules())]
    found = state.numbers()
    for name, value in expected.items():
        assert value is found[name] is None or torch.equal(found[name], value), name


# "saved" is left out: its copy of a tied weight was trained in full, and stays.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "saved"])
def test_removing_the_adapters_restores_the_model(kind):
    words, make, settings, size = KINDS[kind]
    model, give_back = make(), fastlora.remove_lora
    if "peft" in words:
        model, give_back = adapted(model, **settings), fastlora.restore
    before = snapshot(model)
    if "peft" in words:
        fastlora.optimize(model)
    else:
        adapt(model, **settings)
    assert [*map(type, model.modules())] != [*before["classes"].values()]
    model(torch.randn(4, 10, size) if size else torch.arange(20))  # this call caches records
    assert_untouched(give_back(model), before)
    assert not any(name.startswith("_fastlora") for m in model.modules() for name in vars(m))
