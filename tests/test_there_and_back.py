"""Every kind of adapted model: copies compute the same, and restore gives PEFT's back."""

import copy
import pickle

import pytest
import torch
from changes import State, changes_of
from model_kinds import KINDS
from models import assert_untouched, snapshot
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
    if merged:
        changes_of(kind)["merge"](state)
    expected, model = state.numbers(), state.model
    state.model = state.call = copied(model)
    assert [type(module) for module in state.model.modules()] == [*map(type, model.modules())]
    found = state.numbers()
    for name, value in expected.items():
        assert value is found[name] is None or torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own"])
def test_restore_gives_peft_s_model_back(kind):
    state = State(kind)
    model = fastlora.restore(state.model)
    before = snapshot(model)
    fastlora.optimize(model)
    assert [*map(type, model.modules())] != [*before["classes"].values()]
    state.numbers()  # this call caches records
    assert_untouched(fastlora.restore(model), before)
    assert not any(name.startswith("_fastlora") for m in model.modules() for name in vars(m))
