"""The base layers that apply_lora and optimize accept: both must give the same answer."""

import re
from collections.abc import Callable
from operator import methodcaller

import peft
import pytest
import torch
from models import assert_untouched, randomize, refused, snapshot
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import LoRAConfig, LoRALinear


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


def with_member(**members) -> nn.Linear:
    """A layer of a subclass of nn.Linear with these members."""
    return type("Own", (nn.Linear,), members)(6, 6)


def with_attribute(linear: nn.Linear) -> nn.Linear:
    linear.scaling = 0.5
    return linear


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
def test_apply_lora_and_optimize_accept_the_layer(make):
    model, x = with_peft(make()), torch.randn(3, 8)
    y = model(x)
    fastlora.optimize(model, strict=True)
    torch.testing.assert_close(model(x), y)

    linear = make()
    model = nn.Sequential(linear)
    before, y, kind = snapshot(model), model(x), type(linear)
    state = model.state_dict()
    fastlora.apply_lora(model, LoRAConfig(target_modules=["0"]))
    assert model[0] is linear
    assert isinstance(linear, kind)
    assert isinstance(linear, LoRALinear) == isinstance(linear, nn.Linear)
    torch.testing.assert_close(model(x), y)
    model.load_state_dict(state)
    assert repr(model[0]).startswith(f"LoRA{kind.__name__}(in_features=8, out_features=6, bias=")
    fastlora.remove_lora(model)
    assert_untouched(model, before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(("make", "message"), CLASSES.values(), ids=CLASSES)
def test_apply_lora_and_optimize_refuse_the_class(make, message):
    model = nn.Sequential(make())
    with refused(model, re.escape(f"0 can't take an adapter: it is {message}")):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["0"]))
    model, linear = with_peft(nn.Linear(8, 6)), make()
    model.base_model.model[0].base_layer = linear
    (layer,) = fastlora.coverage(fastlora.optimize(model)).layers
    assert layer.reason.replace("its base layer is", "its base is") == f"its base is {message}"


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_apply_lora_and_optimize_refuse_the_tensor(change, message):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6))
    change(model[0])
    for targets in (["0", "1"], ["0"]):
        with pytest.raises(ValueError, match=f"0 can't take an adapter: its {message}"):
            fastlora.apply_lora(model, LoRAConfig(target_modules=targets))
    with pytest.raises(ValueError, match=f"its {message}"):
        LoRALinear.from_linear(model[0], r=2, lora_alpha=4)
    with pytest.warns(UserWarning, match=message):
        fastlora.apply_lora(model, LoRAConfig(target_modules="all-linear"))
    assert [type(layer) for layer in model] == [nn.Linear, LoRALinear]

    model = with_peft(nn.Linear(8, 6))
    change(base_of(model))
    (layer,) = fastlora.coverage(fastlora.optimize(model)).layers
    assert not layer.fast
    assert re.search(message, layer.reason)


def test_a_layer_that_fsdp2_has_already():
    from torch.distributed.fsdp import FSDPModule

    model = nn.Sequential(nn.Linear(8, 6))
    model[0].__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    with refused(model, "0 can't take an adapter: FSDP or DDP has it already"):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["0"]))


OWN_NAMES = {
    "property": (lambda: with_member(r=property(lambda layer: 6)), "r"),
    "method": (lambda: with_member(unmerge=lambda layer: None), "unmerge"),
    "attribute": (lambda: with_attribute(nn.Linear(6, 6)), "scaling"),
}


@pytest.mark.parametrize(("make", "name"), OWN_NAMES.values(), ids=OWN_NAMES)
def test_a_layer_that_already_uses_a_lora_layer_s_attribute_names(make, name):
    """They would be overwritten by apply_lora, and be gone after remove_lora."""
    linear = make()
    model = nn.Sequential(nn.Linear(8, 6), linear)
    with refused(model, f"1 can't take an adapter: it has a {name!r} of its own"):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["0", "1"]))
    assert hasattr(linear, name)


def test_from_linear_takes_subclasses_of_nn_linear():
    with pytest.raises(ValueError, match="apply_lora adapts it in place"):
        LoRALinear.from_linear(Conv1D(6, 8), r=2, lora_alpha=4)
    linear, x = FalconLinear(8, 6), torch.randn(3, 8)
    layer = LoRALinear.from_linear(linear, r=2, lora_alpha=4)
    assert layer.weight is linear.weight
    torch.testing.assert_close(layer(x), linear(x))
