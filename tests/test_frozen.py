"""Frozen linear layers without an adapter, on a CPU that multiplies 16-bit numbers slowly.

Tested by themselves, and as layers of a model with adapters.
"""

import copy
import pickle

import pytest
import torch
from models import Mlp, Tied, adapt, counted_frozen_calls, fast_layers
from torch import nn
from torch.nn.utils import parametrizations

import fastlora
from fastlora.layers import frozen
from fastlora.layers.classes import change_classes, own_classes
from fastlora.layers.report import cover_frozen

pytestmark = pytest.mark.usefixtures("wide")


def linear(dtype=torch.bfloat16, bias=True, **settings):
    return nn.Linear(96, 40, bias=bias, dtype=dtype, **settings).requires_grad_(False)


def taken(**settings):
    layer = linear(**settings)
    assert change_classes(frozen.frozen_classes([layer])) == {layer: nn.Linear}
    return layer


def x_of(*leading, dtype=torch.bfloat16):
    return torch.randn(*leading, 96).to(dtype)


def results(layer, x, dy=None):
    """y and dx."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize(
    ("dtype", "bias", "leading"),
    [(torch.bfloat16, True, (33,)), (torch.float16, False, (3, 7))],
    ids=str,
)
def test_y_and_dx_are_closer_to_the_truth_than_torch_s(dtype, bias, leading):
    layer = taken(dtype=dtype, bias=bias)
    theirs, x = copy.deepcopy(layer), x_of(*leading, dtype=dtype)
    change_classes(own_classes([theirs]))
    dy = torch.randn(*leading, 40).to(dtype)
    truth = results(copy.deepcopy(theirs).double(), x.double(), dy.double())
    ours, their = results(layer, x, dy), results(theirs, x, dy)
    for our, their_one, true in zip(ours, their, truth, strict=True):
        assert our.dtype == dtype
        assert our.shape == true.shape
        best = (true.to(dtype).double() - true).norm()  # one rounding
        assert (our.double() - true).norm() <= 1.05 * best
        # Both may round optimally except for an element or two: 1.0004 of theirs for torch 2.10.
        assert (our.double() - true).norm() <= 1.001 * (their_one.double() - true).norm()


def test_without_gradients_it_is_fast_too():
    layer, x = taken(), x_of(5)
    with counted_frozen_calls() as calls:
        first = layer(x)
        with torch.no_grad():
            second = layer(x)
        with torch.inference_mode():
            third = layer(x)
    assert len(calls) == 3
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert torch.equal(first, third)


class Louder(nn.Linear):
    """Another class with the same forward."""


def changed(name, value):
    layer = linear()
    if isinstance(value, torch.Tensor):
        value = nn.Parameter(value, requires_grad=False)
    setattr(layer, name, value)
    return layer


def inferred():
    with torch.inference_mode():
        return linear()


LEFT = {
    "subclass": lambda: Louder(96, 40, dtype=torch.bfloat16).requires_grad_(False),
    "float32": lambda: linear(torch.float32),
    "float64": lambda: linear(torch.float64),
    "trains": lambda: linear().requires_grad_(True),
    "meta": lambda: linear(device="meta"),
    "replaced-forward": lambda: changed("forward", lambda x: x),
    "parametrized": lambda: parametrizations.weight_norm(linear()),
    "float32-bias": lambda: changed("bias", torch.zeros(40)),
    "inference": inferred,
    "empty": lambda: nn.Linear(96, 0, dtype=torch.bfloat16).requires_grad_(False),
    "sparse": lambda: changed("weight", linear().weight.to_sparse()),
    "no-linear": lambda: nn.LayerNorm(96, dtype=torch.bfloat16).requires_grad_(False),
}


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_other_layers_are_left_unchanged(make):
    layer = make()
    kind, members = type(layer), dict(vars(layer))
    assert frozen.frozen_classes([layer]) == {}
    assert type(layer) is kind
    assert vars(layer) == members


def test_a_weight_that_trains_is_torch_s_while_it_does():
    layer, x = taken(), x_of(4)
    model = nn.Sequential(layer)
    with counted_frozen_calls() as calls:
        layer.weight.requires_grad_(True)
        layer(x).sum().backward()
        assert calls == []
        assert layer.weight.grad is not None
        assert cover_frozen(model) == ()
        layer.weight.requires_grad_(False)
        layer(x)
    assert len(calls) == 1
    assert cover_frozen(model) == ("0",)


def test_invalid_inputs_raise_torch_s_error():
    layer = taken()
    for x in (x_of(4, dtype=torch.float32), torch.ones(4, 95, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError) as theirs:
            nn.functional.linear(x, layer.weight, layer.bias)
        with pytest.raises(RuntimeError) as ours:
            layer(x)
        assert str(ours.value) == str(theirs.value)


def test_transforms_traces_and_exports_are_torch_s():
    layer, x = taken(), x_of(4)
    theirs = copy.deepcopy(layer)
    change_classes(own_classes([theirs]))
    with counted_frozen_calls() as calls:
        assert torch.equal(torch.func.vmap(layer)(x[None]), torch.func.vmap(theirs)(x[None]))
        ours, their = (torch.func.jvp(f, (x,), (x,)) for f in (layer, theirs))
        assert all(map(torch.equal, ours, their))
        assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x), theirs(x))
        graph = str(torch.export.export(layer, (x,)).graph)
    assert calls == []
    assert "fastlora" not in graph


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_are_fast_and_can_be_restored_separately(again):
    layer = taken()
    other = again(layer)
    assert repr(other) == repr(linear())
    assert list(other.state_dict()) == ["weight", "bias"]
    assert torch.equal(other(x_of(4)[:0]), layer(x_of(4)[:0]))
    assert frozen.frozen_classes([other]) == {}
    assert change_classes(own_classes([other])) == {other: frozen.Linear}
    assert own_classes([other]) == {}
    assert type(other) is nn.Linear
    assert type(layer) is frozen.Linear


def test_a_tied_head_is_fast():
    model = adapt(Tied().bfloat16(), target_modules=["mix"])
    assert fast_layers(model) == {"base_model.model.head", "base_model.model.mix.base_layer"}
    base = model.get_base_model()
    assert base.head.weight is base.embed.weight
    assert fastlora.coverage(model).frozen_linears == ("base_model.model.head",)


def test_modules_to_save_are_left_unchanged():
    model = adapt(Mlp().bfloat16(), target_modules=["up"], modules_to_save=["head"])
    assert not any("modules_to_save" in name for name in fast_layers(model))
    with counted_frozen_calls() as calls:
        model(torch.randn(3, 8).bfloat16()).sum().backward()
    assert len(calls) == 1  # down
