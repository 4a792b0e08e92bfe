"""The next call after a change of a layer sees the change, and runs PEFT's forward where it must.

Every change follows a call whose record was cached, so a stale record would show.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy
import peft
import pytest
import torch
from models import tiny_llama
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import config as lora_config
from peft_models import (
    VOCABULARY,
    adapted,
    assert_runs_the_same,
    assert_same,
    counted_calls,
    gradients,
    mlp,
    optimized,
)
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

import fastlora
from fastlora.peft import layer as peft_layer

K, N = 8, 6


def layer_of(**settings) -> nn.Module:
    """A layer with two adapters; only the first one is active."""
    torch.manual_seed(0)
    settings = {"target_modules": ["0"], "init_lora_weights": False} | settings
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), peft.LoraConfig(r=4, **settings))
    model.add_adapter("other", peft.LoraConfig(r=3, **settings))
    return model.base_model.model[0]


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, K, requires_grad=True)


def step(layer: nn.Module) -> list:
    """The layer's output and gradients, or its error."""
    x = inputs()
    try:
        y = layer(x)
        y.square().sum().backward()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    found = [y, x.grad, x, *(each.grad for each in layer.parameters())]
    layer.zero_grad()
    return found


@pytest.fixture
def records(monkeypatch):
    """The results of reading layers: one element each time a layer is read anew."""
    seen, read = [], peft_layer.read
    monkeypatch.setattr(peft_layer, "read", lambda *all: seen.append(read(*all)) or seen[-1])
    monkeypatch.setattr("fastlora.ops.kinds.calls", {})
    return seen


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class DoubledCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Fives(nn.Dropout):
    def forward(self, x):
        return x * 5


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


PARTS = {
    "base": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "dropout": lambda layer: layer.lora_dropout["default"],
    "magnitude": lambda layer: layer.lora_magnitude_vector["default"],
}


def with_forward(module):
    run = module.forward
    module.forward = lambda x: run(x) * 3


def hook(register, result=lambda _, args, *__: (args[0] * 2,)):
    return lambda module: getattr(module, register)(result)


def of(part: str, change: Callable) -> Callable:
    return lambda layer: change(PARTS[part](layer))


def weight(part: str, *shape: int, name: str = "weight", **how) -> Callable:
    """Replace a parameter by another of this shape."""
    return of(part, lambda m: setattr(m, name, nn.Parameter(torch.randn(shape).to(**how))))


def to(part: str, cls: type) -> Callable:
    return of(part, lambda module: setattr(module, "__class__", cls))


def parametrized(part: str, name: str) -> Callable:
    return of(part, lambda m: parametrize.register_parametrization(m, name, Negated()))


def dropout(module: nn.Module) -> Callable:
    return lambda layer: layer.lora_dropout.update({"default": module})


def scaling(value: Any) -> Callable:
    return lambda layer: layer.scaling.update(default=value)


def casting_off(layer):
    layer.cast_input_dtype_enabled = False


# Hooks and forwards that act on a module's call.
ACTING = {
    "pre-hook": hook("register_forward_pre_hook"),
    "hook": hook("register_forward_hook", lambda _, __, y: y * 2),
    "backward-hook": hook("register_full_backward_hook", lambda _, dx, __: (dx[0] * 2,)),
    "backward-pre-hook": hook("register_full_backward_pre_hook", lambda _, dy: (dy[0] * 2,)),
    "forward": with_forward,
}
NAMES = {part: f"the calls of its {part}" for part in ("lora_A", "lora_B")}
NAMES |= {"base": "the calls of its base layer", "dropout": "its dropout"}
PEFT_S = {  # Each value: the change, and the report's reason; "" if the reason is the call's x.
    "base-float64": (of("base", lambda m: m.double()), ""),
    "layer-float64": (lambda layer: layer.double(), ""),
    "scaling-numpy-f32": (scaling(numpy.float32(1.5)), "no finite float32"),
    "scaling-nan": (scaling(float("nan")), "no finite float32"),
    "scaling-large": (scaling(1e39), "no finite float32"),
    "scaling-per-row": (scaling(torch.arange(N)), "its scaling is a tensor of shape (6,)"),
    "lora-float64": (weight("lora_A", 4, K, dtype=torch.float64), "its lora_A is torch.float64"),
    "bias-lora_A": (weight("lora_A", 4, name="bias"), "its lora_A has a bias"),
    "class-base": (to("base", Doubled), "its base is a Doubled, no torch.nn.Linear"),
    "call-base": (to("base", DoubledCall), "DoubledCall.__call__ isn't torch.nn.Module's"),
    "class-lora_A": (to("lora_A", Doubled), "its lora_A is a Doubled, no torch.nn.Linear"),
    "inside-another": (
        lambda layer: setattr(layer, "base_layer", nn.Sequential(layer.base_layer)),
        "its base is a Sequential",
    ),
    "parametrized-base": (parametrized("base", "bias"), "its base is parametrized"),
    "parametrized-lora_B": (parametrized("lora_B", "weight"), "its lora_B is a ParametrizedLinear"),
    "dropout-class": (dropout(Fives()), "something replaces, its dropout"),
    "dropout-of-all": (dropout(nn.Dropout(1.0)), "its dropout drops everything"),
    "dropout-in-place": (dropout(nn.Dropout(0.5, inplace=True)), "changes the input in place"),
    "casting-off": (casting_off, "disable_input_dtype_casting"),
    # Other shapes: PEFT broadcasts, or raises its own error.
    "a-other-in": (weight("lora_A", 4, 7), "its lora_A has shape (4, 7), not (4, 8)"),
    "a-other-rank": (weight("lora_A", 2, K), "its lora_B has shape (6, 4), not (6, 2)"),
    "a-no-rank": (weight("lora_A", 0, K), "its lora_B has shape"),
    "b-broadcast": (weight("lora_B", 1, 4), "its lora_B has shape (1, 4), not (6, 4)"),
    "base-other-out": (weight("base", 1, K), "its base's bias has shape (6,), not (1,)"),
    "bias-broadcast": (weight("base", 1, name="bias"), "its base's bias has shape (1,)"),
    "lora-bias-broadcast": (weight("lora_B", 1, name="bias"), "its lora_B's bias has shape"),
}
for part, named in NAMES.items():
    for name, act in ACTING.items():
        PEFT_S[f"{name}-{part}"] = of(part, act), f"something replaces, {named}"
DORA = {
    "hook-magnitude": (of("magnitude", ACTING["hook"]), "its DoRA magnitude"),
    "magnitude-broadcast": (weight("magnitude", 1), "its DoRA magnitude has shape (1,)"),
    "magnitude-row": (weight("magnitude", 1, N), "its DoRA magnitude has shape (1, 6)"),
    "b-broadcast-dora": PEFT_S["b-broadcast"],
    "bias-broadcast-dora": PEFT_S["bias-broadcast"],
}  # fmt: skip


def assert_seen(change: Callable, records: list, **settings) -> tuple[bool, str]:
    """Compare a changed layer with PEFT's; return whether its call was fast, and why not."""
    ours, theirs = layer_of(**settings).train(), layer_of(**settings).train()
    fastlora.optimize(ours)
    records.clear()
    for _ in range(2):
        torch.testing.assert_close(step(ours), step(theirs))
    assert len(records) == 1  # the second call used the cached record
    for each in (ours, theirs):
        torch.manual_seed(2)
        change(each)
    with counted_calls() as calls:
        found = step(ours)
    expected = step(theirs)
    if isinstance(expected[0], str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, equal_nan=True)
    (report,) = fastlora.coverage(ours).layers
    return bool(calls), report.reason


@pytest.mark.parametrize("name", [*PEFT_S, *DORA])
def test_a_change_makes_the_call_peft_s(name, records):
    change, reason = (PEFT_S | DORA)[name]
    is_fast, said = assert_seen(change, records, **{"use_dora": True} if name in DORA else {})
    assert not is_fast
    assert reason in said


def test_temporary_changes_are_seen(records, monkeypatch):
    layer, x = layer_of(), inputs()
    theirs = copy.deepcopy(layer)
    fastlora.optimize(layer)
    for _ in range(2):
        plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        seen = []
        note = lambda module, *_: seen.append(type(module))  # noqa: B023, E731
        handle = getattr(nn_module, f"register_module_{register}")(note)
        assert "a hook on all modules" in str(fastlora.coverage(layer))
        torch.testing.assert_close(layer(x), plain)
        layer(x).sum().backward()
        handle.remove()
        assert seen.count(nn.Linear) >= 3  # PEFT's forward called them
    with fastlora.use_backend("triton"):
        torch.testing.assert_close(layer(x), plain)
    records.clear()
    with disable_input_dtype_casting(layer):
        layer(x)
    assert "disable_input_dtype_casting" in records[-1].reason
    run = nn.Linear.forward
    # a patch of torch's own class
    monkeypatch.setattr(nn.Linear, "forward", lambda *all: run(*all) * 2)
    torch.testing.assert_close(layer(x), theirs(x))
    assert "Linear.forward was replaced on the class" in records[-1].reason


@pytest.mark.parametrize("made", ["base", "model"])
def test_tensors_made_in_inference_mode(made):
    """PEFT's product saves no weight if x needs no gradient; fastlora's node does."""
    layer, x = layer_of(), torch.randn(64, K)
    with torch.inference_mode():
        if made == "model":
            layer = layer_of()
        else:
            layer.base_layer.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
    found = []
    # the same layer, because a copy isn't an inference tensor
    for optimize in (lambda _: None, fastlora.optimize):
        optimize(layer)
        with torch.no_grad():
            layer(x)
        y = layer(x)
        if y.requires_grad:
            y.square().sum().backward()
        found.append([y, *[tensor.grad for tensor in layer.parameters()]])
        layer.zero_grad()
    torch.testing.assert_close(*found)


def under_autocast(x: Tensor) -> Callable:
    def call(layer):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    return call


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(n, K) for n in (3, 5)], layout=layout)


CALLS = {
    "too-few": lambda layer: layer(torch.randn(4, 7)),
    "one": lambda layer: layer(torch.randn(4, 1)),
    "number": lambda layer: layer(torch.tensor(1.0)),
    "whole-numbers": lambda layer: layer(torch.ones(4, K, dtype=torch.long)),
    "no-rows": lambda layer: layer(torch.randn(0, K)),
    "a-vector": lambda layer: layer(torch.randn(K)),
    "a-list": lambda layer: layer([1.0] * K),
    "nothing": lambda layer: layer(None),
    "no-input": lambda layer: layer(),
    "other-dtype": lambda layer: layer(inputs().double()),
    "other-device": lambda layer: layer(inputs().to("meta")),
    "argument": lambda layer: layer(inputs(), 1),
    "keyword": lambda layer: layer(inputs(), scale=1),
    "autocast-whole-numbers": under_autocast(torch.ones(2, K, dtype=torch.long)),
    "autocast-other-dtype": under_autocast(torch.ones(2, K).double()),
    "autocast-complex": under_autocast(torch.ones(2, K, dtype=torch.complex64)),
    "nested": lambda layer: layer(nested(torch.jagged)).to_padded_tensor(0.0),
    "nested-strided": lambda layer: layer(nested(torch.strided)).to_padded_tensor(0.0),
    "names-too-few": lambda layer: layer(inputs(), adapter_names=["default"]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_input_that_does_not_fit_is_peft_s(settings, name):
    found, layer = [], layer_of(**settings)
    for each in (layer, optimized(layer)):
        torch.manual_seed(0)
        try:
            found.append(CALLS[name](each).detach())
        except Exception as error:
            found.append((type(error), str(error)))
    theirs, ours = found
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours == theirs


def test_the_input_of_a_saved_call_must_not_change_before_backward():
    """The same error as in PEFT, and no wrong gradient."""
    for layer in (theirs := layer_of(), optimized(theirs)):
        x = inputs() * 1
        y = layer(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_compiled_with_a_global_hook():
    theirs = layer_of()
    ours = optimized(theirs)
    double = lambda module, _, y: y * 2 if type(module) is nn.Linear else None  # noqa: E731
    handle = nn_module.register_module_forward_hook(double)
    torch._dynamo.reset()
    found = torch.compile(ours, backend="eager")(inputs()), theirs(inputs())
    handle.remove()
    torch.testing.assert_close(*found)


def test_once_a_hook_is_gone_the_layer_is_fast_again():
    layer = optimized(layer_of())
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: None)
    assert not fastlora.coverage(layer).fast
    handle.remove()
    with counted_calls() as calls:
        layer(inputs())
    assert len(calls) == 1


VARIANTS = {
    "velora": lambda: {"velora_config": lora_config.VeloraConfig(num_groups=2)},
    "bdlora": lambda: {"use_bdlora": lora_config.BdLoraConfig(["up"], ["down"], nblocks=2)},
    "monteclora": lambda: {"monteclora_config": lora_config.MontecloraConfig(num_samples=2)},
    "kasa": lambda: {"kasa_config": lora_config.KasaConfig()},
    "mica": lambda: {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_peft_s(name):
    try:
        settings = VARIANTS[name]()
    except AttributeError as error:
        pytest.skip(f"needs a newer PEFT: {error}")
    theirs = mlp(**settings)
    ours = optimized(theirs)
    assert not any(layer.fast for layer in fastlora.coverage(ours).layers)
    run = lambda model: gradients(model.train())  # noqa: E731
    assert_runs_the_same(run, theirs, ours, fast=0, tolerance=0.0)


def test_alora_is_peft_s():
    settings = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
    theirs = adapted(tiny_llama(torch.float64), target_modules=["q_proj", "v_proj"], **settings)
    ours = optimized(theirs)
    ids = torch.randint(9, VOCABULARY, (2, 10))
    ids[0, 4:6] = torch.tensor([7, 8])  # the second row isn't adapted
    assert_same(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, 0.0)
    assert "ALora" in str(fastlora.coverage(ours))
    assert not fastlora.coverage(ours).fast
