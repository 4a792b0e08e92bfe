"""Models are called, changed and called again; each compiled call agrees with the uncompiled one.

Without the compiler, each call agrees with a call that reads every module anew.  `python -m
tests.fuzz --backend compiled` (and kept) continues with random changes.
"""

import gc
import weakref

import pytest
import torch
from compiled_states import KINDS, State, changes_of
from peft.tuners.lora.layer import LoraLayer
from peft_models import counted_calls
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.layers import guards
from fastlora.layers.adapted import LoRALayer
from fastlora.layers.mlp import GatedMLP

# By kind of model: sequences of changes (names in CHANGES of compiled_states.py), with a call after
# each change.
WALKS = {
    "linear": (
        "merge unmerge merge-plain remove apply", "scaling pair bias tied base-trains",
        "train dropout one-frozen adapters-train x step data", "load parametrized cast world",
        "forward forward rows layer-mode adapters-replaced",
    ),
    "saved": ("merge unmerge step remove",),
    "conv1d": ("merge unmerge bias",),
    "quantized": ("merge unmerge merge-plain unmerge remove",),
    "block": ("merge activation remove",),
    "experts": ("merge-one rescaled implementation", "pack remove"),
    "router": ("merge",),
    "peft": (
        "merge unmerge disable enable layer-disabled", "add set-adapter merge-some unmerge delete",
        "set-scale scale-layer unscale-layer scaling scaling-tensor pair",
        "train dropout-edited dropout-replaced step",
        "restore optimize forward cast", "load hotswap unload",
    ),
    "peft-saved": ("disable add delete",),
    "peft-dora": ("merge unmerge variant-dropped",),
    "peft-quantized": ("merge restore",),
    "peft-block": ("activation restore optimize",),
    "peft-experts": ("merge restore",),
}  # fmt: skip
ROWS = [(kind, walk) for kind, walks in WALKS.items() for walk in walks if kind in KINDS]
WAYS = ("model", "in-place", "layers")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def follow(kind: str, walk: str, way: str, p: float = 0.3, **how) -> None:
    state = State(kind, p).compile(way, **how)
    state.compare()
    for name in walk.split():
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

    Only "linear" has all changes of tensors, which AOTAutograd guards.
    """
    compiler = "aot_eager" if kind == "linear" else "eager"
    follow(kind, walk, WAYS[number % 3], backend=compiler)


@pytest.mark.parametrize(("kind", "walk"), [("linear", "merge"), ("peft", "merge disable")])
def test_inductor_follows(kind, walk):
    follow(kind, walk, "model", p=0.0, fullgraph=True)


@pytest.mark.parametrize("kind", ["linear", "peft"])
def test_hooks_are_followed_with_torch_s_setting(kind):
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        follow(kind, "hook hook unhook", "model", backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "walk"), ROWS, ids=[f"{kind}-{walk.replace(' ', ',')}" for kind, walk in ROWS]
)
def test_cached_records_follow_each_change(kind, walk):
    state = State(kind, 0.3).compile("kept")
    for name in ("nothing", "train", "rows", *walk.split(), "evaluate"):
        changes_of(kind)[name](state)
        for _ in range(3):  # the first call reads and caches, the others use the cached record
            state.compare()


OF_PEFT = [(kind, walk) for kind, walk in ROWS if kind.startswith("peft")]
OF_PEFT += [(kind, "hook hook unhook hook") for kind in ("peft", "peft-block", "peft-experts")]
OF_PEFT += [("peft-block", "merge unmerge merge-one disable enable add set-adapter delete")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "walk"), OF_PEFT, ids=map("-".join, OF_PEFT))
def test_each_change_has_the_same_effect_as_in_peft(kind, walk):
    """On an optimized model whose calls are fast before the first change."""
    state = State(kind).compile("peft")
    with counted_calls() as calls:
        state.numbers(True)
    assert calls
    for name in ("nothing", "train", *walk.split()):
        if name != "forward":  # the replaced forward of a copy would be the original's
            changes_of(kind)[name](state)
            state.compare()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_reads_nothing(kind, monkeypatch):
    """Except the values of its tensors, which training changes."""
    state, records = State(kind).compile("kept"), []
    kept = guards.GuardedRecord.__init__
    monkeypatch.setattr(
        guards.GuardedRecord, "__init__", lambda self, it: records.append(it) or kept(self, it)
    )
    state.numbers(True)
    assert records or "experts" in state.words
    records.clear()
    changes_of(kind)["step"](state)
    state.numbers(True)
    assert not records


@pytest.mark.parametrize(
    "kind", ["linear", "block", "peft", "peft-dora", "peft-block", "peft-quantized"]
)
def test_cached_records_keep_no_weights_alive(kind):
    """A removed layer is freed at once, without the garbage collector."""
    freed = []
    for calls in (0, 2):
        state = State(kind).compile("kept")
        for _ in range(calls):
            state.numbers(True)
        (layer, *_) = (
            m for m in state.model.modules() if isinstance(m, (GatedMLP, LoraLayer, LoRALayer))
        )
        assert bool(calls) == any(place in vars(layer) for place in guards._PLACES)
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


@pytest.mark.parametrize("kind", [k for k in ("conv1d", "peft-conv1d", "quantized") if k in KINDS])
def test_a_replaced_weight_is_freed(kind):
    """For a view, a record holds the layout, but no reference to the memory."""
    state = State(kind).compile("kept")
    state.numbers(True)
    state.compare()
    memory = [StorageWeakRef(p.untyped_storage()) for p in state.model.parameters()]
    for p in state.model.parameters():
        p.data = p.data.clone()
    assert all(each.expired() for each in memory)
    state.compare()
