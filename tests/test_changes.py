"""Models are called, changed and called again; each call agrees with an unoptimized one."""

import gc
import weakref
from functools import partial

import pytest
import torch
from changes import CHANGES, ChangingModel, State, changes_of
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from model_kinds import KINDS
from peft.tuners.lora.layer import LoraLayer
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora import LoRALinear
from fastlora.layers import guards
from fastlora.layers.mlp import GatedMLP

pytestmark = pytest.mark.usefixtures("fresh_compiler")
# The number of random models of a kind; each is changed 12 times.
MODELS = dict.fromkeys(KINDS, 3) | dict.fromkeys(("own", "linear", "block"), 14)
LONG = settings.get_current_profile_name() == "long"


@pytest.mark.parametrize("compiled", [False, True] if LONG else [False])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_follow_random_changes(kind, compiled):
    how = settings(max_examples=1000 if LONG else MODELS[kind], stateful_step_count=12)
    run_state_machine_as_test(partial(ChangingModel, kind, compiled), settings=how)


# Changes of compiled models, with a call after each.  Compiling takes too long for random ones.
WALKS = {
    "own": (
        "merge unmerge load merge-one", "scaling pair bias tied base-trains",
        "train dropout one-frozen adapters-train x step data", "parametrized cast world",
        "forward forward rows layer-mode adapters-replaced",
    ),
    "linear": (
        "merge unmerge disable enable layer-disabled", "add set-adapter merge-some unmerge delete",
        "set-scale scale-layer unscale-layer scaling scaling-tensor pair",
        "train dropout-edited dropout-replaced step",
        "restore optimize forward cast", "load hotswap unload",
    ),
    "saved": ("disable add delete",),
    "dora": ("merge unmerge variant-dropped",),
    "quantized": ("merge restore",),
    "block": ("activation restore optimize",),
    "experts": ("merge restore",),
    "packed-experts": ("merge unmerge",),
}  # fmt: skip
ROWS = [(kind, walk) for kind, walks in WALKS.items() for walk in walks if kind in KINDS]
WAYS = ("model", "in-place", "layers")


def follow(kind: str, walk: str, way: str, p: float = 0.3, **how) -> None:
    state = State(kind, p).compile(way, **how)
    for name in ("nothing", *walk.split()):
        changes_of(kind)[name](state)
        state.compare()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "walk", "number"),
    [(*row, number) for number, row in enumerate(ROWS)],
    ids=[f"{kind}-{walk.replace(' ', ',')}" for kind, walk in ROWS],
)
def test_each_change_is_followed(kind, walk, number):
    """The three ways of compiling take turns.

    Only "own" has all changes of tensors, which AOTAutograd guards.
    """
    compiler = "aot_eager" if kind == "own" else "eager"
    follow(kind, walk, WAYS[number % 3], backend=compiler)


@pytest.mark.parametrize(("kind", "walk"), [("own", "merge"), ("linear", "merge disable")])
def test_inductor_follows(kind, walk):
    follow(kind, walk, "model", p=0.0, fullgraph=True)


@pytest.mark.parametrize("kind", ["own", "linear"])
def test_hooks_are_followed_with_torch_s_setting(kind):
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        follow(kind, "hook hook unhook", "model", backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_reads_nothing(kind, monkeypatch):
    """Except the values of its tensors, which training changes."""
    state, records = State(kind), []
    kept = guards.GuardedRecord.__init__
    monkeypatch.setattr(
        guards.GuardedRecord, "__init__", lambda self, it: records.append(it) or kept(self, it)
    )
    state.numbers()
    assert records or "experts" in state.words
    records.clear()
    CHANGES[""]["step"](state)
    state.numbers()
    assert not records


@pytest.mark.parametrize("kind", ["own", "linear", "dora", "block", "quantized"])
def test_cached_records_keep_no_weights_alive(kind):
    """A removed layer is freed at once, without the garbage collector."""
    freed = []
    for calls in (0, 2):
        state = State(kind)
        for _ in range(calls):
            state.numbers()
        (layer, *_) = (
            m for m in state.model.modules() if isinstance(m, (GatedMLP, LoraLayer, LoRALinear))
        )
        assert bool(calls) == (guards._PLACE in vars(layer))
        weights = [weakref.ref(each) for each in (layer, *layer.parameters())]
        gc.collect()
        gc.disable()
        try:
            for children in [module._modules for module in state.model.modules()]:
                for name in [name for name, child in children.items() if child is layer]:
                    del children[name]  # other references to the model don't matter
            del layer
            freed.append([weight() is None for weight in weights])
        finally:
            gc.enable()
    assert freed[0] == freed[1]
    # transformers' module is in a reference cycle of its own
    assert any(freed[0]) or "block" in kind


@pytest.mark.parametrize("kind", [k for k in ("conv1d", "quantized") if k in KINDS])
def test_a_replaced_weight_is_freed(kind):
    """For a view, a record holds the layout, but no reference to the memory."""
    state = State(kind)
    state.numbers()
    state.compare()
    memory = [StorageWeakRef(p.untyped_storage()) for p in state.model.parameters()]
    for p in state.model.parameters():
        p.data = p.data.clone()
    assert all(each.expired() for each in memory)
    state.compare()
