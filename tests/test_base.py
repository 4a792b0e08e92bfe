"""The base layers that optimize and LoRALinear accept."""

import re
from collections.abc import Callable
from operator import methodcaller

import peft
import pytest
import torch
from models import randomize, refused
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import LoRALinear


class Packed(torch.Tensor):
    """A tensor subclass in a plain nn.Linear, as torchao uses it."""


class Named(nn.Linear):
    """A subclass of nn.Linear that inherits its forward."""

    def get_extra_state(self):
        return {"name": "x"}

    def set_extra_state(self, state):
        assert state == {"name": "x"}


class Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LouderConv1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def replaced(change: Callable, name: str = "weight") -> Callable:
    """Replaces a layer's weight or bias by a frozen one with these changes."""
    return lambda linear: setattr(linear, name, frozen(change(getattr(linear, name).detach())))


TAKEN = {
    "linear": lambda: nn.Linear(8, 6),
    "no-bias": lambda: nn.Linear(8, 6, bias=False),
    "subclass": lambda: Named(8, 6),
    "falcon": lambda: FalconLinear(8, 6),
    "conv1d": lambda: Conv1D(6, 8),
}
CLASSES = {
    "forward": (lambda: Louder(8, 6), "a Louder, no torch.nn.Linear"),
    "forward-conv1d": (lambda: LouderConv1D(6, 8), "a LouderConv1D, no torch.nn.Linear"),
    "call": (lambda: Called(8, 6), "a Called (Called.__call__ isn't torch.nn.Module's)"),
}
TENSORS = {
    "packed": (
        replaced(lambda weight: weight.as_subclass(Packed)),
        r"weight .*of class Packed \(quantized\?\)",
    ),
    "packed-bias": (
        replaced(lambda bias: bias.as_subclass(Packed), "bias"),
        r"bias is of class Packed \(quantized\?\)",
    ),
    "sparse": (replaced(torch.Tensor.to_sparse_csr), "weight .*has layout torch.sparse_csr"),
    "3-d": (replaced(lambda weight: weight[None]), r"weight .*has shape \(1, 6, 8\)"),
    "1-d": (replaced(torch.flatten), r"weight .*has shape \(48,\)"),
    **{
        str(dtype): (replaced(methodcaller("to", dtype)), f"weight .*has dtype {dtype}")
        for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64)
    },
}


def with_peft(linear: nn.Module) -> nn.Module:
    config = peft.LoraConfig(target_modules=["0"], fan_in_fan_out=isinstance(linear, Conv1D))
    return randomize(peft.get_peft_model(nn.Sequential(linear), config))


def base_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("base_model.model.0.base_layer")


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_optimize_accepts_the_layer(make):
    model, x = with_peft(make()), torch.randn(3, 8)
    y = model(x)
    fastlora.optimize(model, strict=True)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(("make", "message"), CLASSES.values(), ids=CLASSES)
def test_the_class_is_refused(make, message):
    model, linear = with_peft(nn.Linear(8, 6)), make()
    model.base_model.model[0].base_layer = linear
    (layer,) = fastlora.coverage(fastlora.optimize(model)).layers
    assert layer.reason.replace("its base layer is", "its base is") == f"its base is {message}"
    with refused(linear, f"it is a {type(linear).__name__}, no torch.nn.Linear"):
        LoRALinear.from_linear(linear, r=2, lora_alpha=4)


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_the_tensor_is_refused(change, message):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6))
    change(model[0])
    with pytest.raises(ValueError, match=f"0 can't take an adapter: its {message}"):
        fastlora.replace_linears(model, ["1", "0"], r=2, lora_alpha=4)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]

    model = with_peft(nn.Linear(8, 6))
    change(base_of(model))
    (layer,) = fastlora.coverage(fastlora.optimize(model)).layers
    assert not layer.fast
    assert re.search(message, layer.reason)
