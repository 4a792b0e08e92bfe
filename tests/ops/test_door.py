"""Each argument of the op with values of wrong kinds: it works as documented or is refused.

The error is always a ValueError or a TypeError of fastlora's own, never an error from torch.
"""

from collections import namedtuple

import pytest
import torch
import wrong_kinds
from torch import Tensor, nn

import fastlora
from fastlora import LoRALinear, Projection
from fastlora.projection import Adapter, Base, Output

TENSORS = ("x", "weight", "lora_a", "lora_b", "bias")
SAMPLE = torch.ones(4, 4)


def good() -> dict:
    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (2, 8), "weight": (6, 8), "lora_a": (3, 8), "lora_b": (6, 3), "bias": (6,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def forward(**arguments) -> Tensor:
    with torch.no_grad():
        return fastlora.lora_linear(**arguments)


def with_gradients(**arguments) -> Tensor:
    return fastlora.lora_linear(**arguments)


def under_autocast(**arguments) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return fastlora.lora_linear(**arguments)


LEAF = good()["x"].requires_grad_()
CALLS = pytest.mark.parametrize("call", [forward, with_gradients, under_autocast])


def unexpected(call, name: str, *arguments, **named) -> dict[str, str]:
    # caches a valid call first: the wrong ones must not count as the same kind
    call(**good() | {"x": LEAF})
    return wrong_kinds.unexpected(
        lambda value: call(**good() | {"x": LEAF, name: value}), *arguments, **named
    )


@pytest.mark.parametrize("name", TENSORS)
def test_values_that_are_no_tensors(name):
    kinds = {kind: value for kind, value in wrong_kinds.values().items() if "tensor" not in kind}
    fine = {"none"} if name == "bias" else ()
    message = rf"^{name} must be a tensor( or None)?, not \w+$"
    assert unexpected(with_gradients, name, message, fine, error=TypeError, kinds=kinds) == {}


@CALLS
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_another_kind_of_tensor(name, call):
    kinds = wrong_kinds.tensors_like(good()[name])
    if name == "x":
        del kinds["nested"], kinds["jagged"]  # these work: tests/test_torch_s_own.py
    message = rf"\b{name} (is|has)\b.*(must|move|make|call)"
    assert unexpected(call, name, message, kinds=kinds) == {}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kind", wrong_kinds.others_like(SAMPLE))
def test_a_kind_of_tensor_that_works(name, kind, backend):
    arguments = good()
    expected = fastlora.reference.lora_linear(**arguments)
    arguments[name] = wrong_kinds.others_like(arguments[name])[kind]
    torch.testing.assert_close(forward(**arguments).as_subclass(Tensor), expected)


@pytest.mark.usefixtures("node")  # torch's own operations don't save the bias for backward
@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias"])
def test_inference_tensors_are_not_saved_for_backward(name, backend):
    kinds = {"inference": wrong_kinds.others_like(good()[name])["inference"]}
    message = f"^{name} was made in inference mode.*clone it"
    assert unexpected(with_gradients, name, message, error=TypeError, kinds=kinds) == {}


@pytest.mark.parametrize("name", ["x", "dy"])
def test_a_negated_view_in_the_backward(name, backend):
    """A negated view stores its values with the opposite sign, and kernels read memory directly."""
    found = []
    for negate in (False, True):
        x, dy = good()["x"], torch.ones(2, 6)
        tensors = {"x": x, "dy": dy}
        if negate:
            tensors[name] = torch._neg_view(-tensors[name])
        lora_a = good()["lora_a"].requires_grad_()
        y = fastlora.lora_linear(**good() | {"x": tensors["x"], "lora_a": lora_a})
        found.append(torch.autograd.grad(y, lora_a, tensors["dy"])[0])
    torch.testing.assert_close(*found)


NUMBERS = {
    "scale": {"zero", "two", "half", "negative", "numpy-float64"},
    "dropout": {"zero", "half", "numpy-float64"},
    "training": {"true", "false"},
    "backend": {"none"},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_wrong_numbers_switches_and_names(name):
    """A number must be a Python number; numpy.float64 is a subclass of float."""
    message = rf"^{name} (is|asks for) .*(must|there is only)"
    assert unexpected(with_gradients, name, message, NUMBERS[name], error=ValueError) == {}


LONGER = namedtuple("LONGER", [*Projection._fields, "more"])
ONE = Projection(*[good()[name] for name in TENSORS[1:]])
GROUPS = {
    **{kind: value for kind, value in wrong_kinds.values().items() if "list" not in kind},
    **{f"list-of-{kind}": [value] for kind, value in wrong_kinds.values().items()},
    "alone": ONE,
    "output-alone": Output(Base(ONE.weight)),
    "tuple": [tuple(ONE)],
    "short": [tuple(ONE)[:3]],
    "longer": [LONGER(*ONE, None)],
    "iterator": (one for one in [ONE]),
    "set": frozenset(),
    "array": [ONE, torch.ones(3)],
    "base": [Base(ONE.weight)],
    "adapter": [Adapter(ONE.lora_a, ONE.lora_b)],
    "list-of-lists": [[ONE]],
    "empty": [],
}


def test_a_group():
    message = r"must be a list|no projections came: give|must be an Output"
    call = lambda group: fastlora.lora_linears(LEAF, group)  # noqa: E731
    call([ONE])  # caches a valid call first
    assert wrong_kinds.unexpected(call, message, kinds=GROUPS) == {}


LAYER = {
    "r": {"two"},
    "lora_alpha": {"zero", "two", "half", "negative", "numpy-float64"},
    "lora_dropout": {"zero", "half", "numpy-float64"},
    "use_rslora": {"true", "false"},
}


LINEAR = nn.Linear(8, 6)
LAYERS = {
    "new": lambda **settings: LoRALinear(8, 6, **settings),
    "from-linear": lambda **one: LoRALinear.from_linear(LINEAR, **{"r": 2, "lora_alpha": 4} | one),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", LAYER)
def test_a_layer_s_settings(name, make):
    """The settings of LoRA layers; all other arguments belong to nn.Linear."""
    call = lambda value: make(**{name: value})(torch.ones(2, 8))  # noqa: E731
    message = rf"^{name} is .* must "
    assert wrong_kinds.unexpected(call, message, LAYER[name], error=ValueError) == {}


def test_from_linear_refuses_values_that_are_no_linear_layers():
    call = lambda linear: LoRALinear.from_linear(linear, r=1, lora_alpha=1)  # noqa: E731
    message = r"it is a \w+, no torch.nn.Linear"
    assert wrong_kinds.unexpected(call, message, {"module"}, error=ValueError) == {}


def test_use_backend_refuses_values_that_are_no_backend_names():
    message = r"^use_backend asks for .* there is only 'torch', 'triton'"
    assert wrong_kinds.unexpected(fastlora.use_backend, message, error=ValueError) == {}


def test_kernels_never_see_a_tensor_without_memory(recwarn):
    """Reading a FakeTensor's data_ptr() returns 0 and makes torch warn."""
    fake = wrong_kinds.tensors_like(good()["weight"])["fake"]
    message = "^weight is a FakeTensor, but x is a Tensor"
    with fastlora.use_backend("triton"):
        assert unexpected(forward, "weight", message, kinds={"fake": fake}) == {}
    assert not [w for w in recwarn if "data pointer" in str(w.message)]
