"""Compiled, called, changed and called again: each call is as that of the model not compiled.

`python -m tests.fuzz --backend compiled` walks on, at random.
"""

import pytest
import torch
from compiled_states import KINDS, State, changes_of

# What happens between two calls, one after the other, by the kind of model.
WALKS = {
    "linear": (
        "merge unmerge merge-plain remove apply", "scaling pair bias tied base-trains",
        "train dropout one-frozen adapters-train x step data", "load parametrised cast world",
        "forward forward rows layer-mode adapters-replaced",
    ),
    "saved": ("merge unmerge step remove",),
    "conv1d": ("merge unmerge bias",),
    "quantised": ("merge unmerge merge-plain unmerge remove",),
    "block": ("merge activation remove",),
    "experts": ("merge-one rescaled implementation", "pack merge unmerge remove"),
    "router": ("merge unmerge",),
    "peft": (
        "merge unmerge disable enable layer-disabled", "add set-adapter merge-some unmerge delete",
        "set-scale scaling scaling-tensor pair", "train dropout-edited dropout-replaced step",
        "restore optimize forward cast", "load hotswap unload",
    ),
    "peft-saved": ("merge unmerge disable add delete",),
    "peft-dora": ("merge unmerge variant-dropped step",),
    "peft-quantised": ("merge unmerge disable restore",),
    "peft-block": ("activation merge restore optimize",),
    "peft-experts": ("merge unmerge add", "disable restore activation"),
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
    """By either compiler and each way in turn."""
    compiler = ("eager", "aot_eager")[number % 2]
    follow(kind, walk, WAYS[number % 3], backend=compiler)


@pytest.mark.parametrize(
    ("kind", "walk"), [("linear", "merge unmerge"), ("peft", "merge disable enable restore")]
)
def test_inductor_follows(kind, walk):
    follow(kind, walk, "model", p=0.0, fullgraph=True)


@pytest.mark.parametrize("kind", ["linear", "peft"])
def test_hooks_are_followed_where_torch_is_told_to(kind):
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        follow(kind, "hook hook unhook", "model", backend="eager")
