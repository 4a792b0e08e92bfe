"""A known call of an optimised layer isn't judged again; so whatever may change is seen again."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

import fastlora
from fastlora.peft import layer as fast_layer

K, N = 8, 6


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(K, N)

    def forward(self, x):
        return self.up(x)


def adapted():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["up"], init_lora_weights=False)
    model = peft.get_peft_model(Up(), config)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    return model.base_model.model.up


def inputs():
    torch.manual_seed(1)
    return torch.randn(5, K, requires_grad=True)


@pytest.fixture
def readings(monkeypatch):
    """How often a layer is read."""
    seen, read = [], fast_layer.read
    monkeypatch.setattr(fast_layer, "read", lambda *all: seen.append(read(*all)) or seen[-1])
    monkeypatch.setattr("fastlora.ops.kinds._known", {})
    return seen


def parts(layer):
    return {
        "base": layer.base_layer,
        "lora_A": layer.lora_A["default"],
        "lora_B": layer.lora_B["default"],
        "dropout": layer.lora_dropout["default"],
    }


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Fives(nn.Dropout):
    def forward(self, x):
        return x * 5


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def with_forward(module):
    run = module.forward
    module.forward = lambda x: run(x) * 3


def hook(register, result=lambda _, args, *__: (args[0] * 2,)):
    return lambda module: getattr(module, register)(result)


OF_A_PART = {
    "pre-hook": hook("register_forward_pre_hook"),
    "hook": hook("register_forward_hook", lambda _, __, y: y * 2),
    "backward-hook": hook("register_full_backward_hook", lambda _, dx, __: (dx[0] * 2,)),
    "instance-forward": with_forward,
}


def new_weight(module, **how):
    module.weight = nn.Parameter(torch.randn(module.weight.shape).to(**how))


def set_data(tensor, value):
    tensor.data = value


def longer(module):
    """Of 2 rows more, or columns, in the same Parameter: PEFT's own error is the right one."""
    module.weight.data = torch.randn(module.weight.shape[0] + 2, module.weight.shape[1])


CHANGES = {
    "another-adapter": lambda layer: layer.set_adapter("other"),
    "two-adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "no-adapters": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "scaling": lambda layer: layer.scale_layer(3.0),
    "scaling-tensor": lambda layer: layer.scaling.update(default=torch.tensor(0.25)),
    "scaling-infinite": lambda layer: layer.scaling.update(default=float("inf")),
    "weight": lambda layer: new_weight(layer.base_layer),
    "lora_A": lambda layer: new_weight(layer.lora_A["default"]),
    "lora_B": lambda layer: new_weight(layer.lora_B["default"]),
    "data": lambda layer: set_data(layer.lora_A["default"].weight, torch.ones(4, K)),
    "transposed": lambda layer: set_data(layer.base_layer.weight, torch.randn(K, N).t()),
    "lora-float64": lambda layer: set_data(
        layer.lora_A["default"].weight, torch.ones(4, K).double()
    ),
    "lora_B-longer": lambda layer: longer(layer.lora_B["default"]),
    "base-longer": lambda layer: longer(layer.base_layer),
    "base-float64": lambda layer: layer.base_layer.double(),
    "layer-float64": lambda layer: layer.double(),
    "no-bias": lambda layer: setattr(layer.base_layer, "bias", None),
    "bias-longer": lambda layer: set_data(layer.base_layer.bias, torch.randn(1)),
    "bias-of-lora_A": lambda layer: setattr(
        layer.lora_A["default"], "bias", nn.Parameter(torch.ones(4))
    ),
    "bias-of-lora_B": lambda layer: setattr(
        layer.lora_B["default"], "bias", nn.Parameter(torch.ones(N))
    ),
    "base-layer": lambda layer: setattr(layer, "base_layer", nn.Linear(K, N, bias=False)),
    "base-class": lambda layer: setattr(layer.base_layer, "__class__", Doubled),
    "lora_A-class": lambda layer: setattr(layer.lora_A["default"], "__class__", Doubled),
    "lora_B-class": lambda layer: setattr(layer.lora_B["default"], "__class__", Doubled),
    "dropout-class": lambda layer: layer.lora_dropout.update({"default": Fives()}),
    "dropout-of-all": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "parametrised-base": lambda layer: parametrize.register_parametrization(
        layer.base_layer, "bias", Negated()
    ),
    "parametrised-lora": lambda layer: parametrize.register_parametrization(
        layer.lora_B["default"], "weight", Negated()
    ),
    "frozen-lora_A": lambda layer: layer.lora_A.requires_grad_(False),
    **{
        f"{name}-of-{part}": lambda layer, change=change, part=part: change(parts(layer)[part])
        for name, change in OF_A_PART.items()
        for part in ("base", "lora_A", "lora_B", "dropout")
    },
}


def step(layer):
    """Its output and gradients, or what it raises."""
    x = inputs()
    try:
        y = layer(x)
        y.square().sum().backward()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    found = [y, x.grad, *(each.grad for each in layer.parameters())]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(readings, name):
    ours, theirs = adapted(), adapted()
    fastlora.optimize(ours)
    readings.clear()
    for _ in range(2):
        torch.testing.assert_close(step(ours), step(theirs))
    assert len(readings) == 1  # the second call is known
    for each in (ours, theirs):
        torch.manual_seed(2)
        CHANGES[name](each)
    ours_found, theirs_found = step(ours), step(theirs)
    if isinstance(theirs_found[0], str):
        assert ours_found == theirs_found
    else:
        torch.testing.assert_close(ours_found, theirs_found, equal_nan=True)


def test_a_change_of_the_moment_is_seen(readings, monkeypatch):
    layer, x = adapted(), inputs()
    theirs = copy.deepcopy(layer)
    fastlora.optimize(layer)
    for _ in range(2):
        plain = layer(x)
    readings.clear()

    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    seen = []
    handle = nn_module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    torch.testing.assert_close(layer(x), plain)
    handle.remove()
    assert seen.count(nn.Linear) == 3  # PEFT's forward called them
    jacobian = torch.func.jacrev(layer)(x.detach())
    assert jacobian.shape == (5, N, 5, K)
    with fastlora.use_backend("triton"):
        torch.testing.assert_close(layer(x), plain)
    layer.cast_input_dtype_enabled = False
    assert not readings[-1].reason
    layer(x)
    assert "disable_input_dtype_casting" in readings[-1].reason
    layer.cast_input_dtype_enabled = True
    run = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda *all: run(*all) * 2)  # of torch's own class
    torch.testing.assert_close(layer(x), theirs(x))
    assert "no torch.nn.Linear" in readings[-1].reason


def test_training_and_evaluation_are_two_kinds(readings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["up"], lora_dropout=0.5, init_lora_weights=False)
    layer, x = peft.get_peft_model(Up(), config).base_model.model.up, inputs()
    theirs = copy.deepcopy(layer).eval()
    fastlora.optimize(layer)
    for _ in range(2):
        assert not torch.equal(layer.train()(x), layer(x))
        torch.testing.assert_close(layer.eval()(x), theirs(x))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), theirs(x))
    readings.clear()
    layer.train()(x), layer.eval()(x)
    assert not readings
    layer.lora_dropout["default"].p = 0.25
    layer.train()(x)
    assert [reading.p for reading in readings] == [0.25]


def test_layers_of_one_kind_are_judged_once(readings):
    for _ in range(3):
        layer = adapted()
        fastlora.optimize(layer)
        assert type(layer) is not PeftLinear
        readings.clear()
        layer(inputs())
    assert not readings
