"""Every argument of the op with every wrong kind: it works as documented, or the door says why not.

No other class of error than ValueError and TypeError, and no error of torch's.
"""

import traceback
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import wrong_kinds
from torch import Tensor, nn

import fastlora
from fastlora import LoRALinear, Projection
from fastlora.projection import Adapter, Base, Output

PACKAGE = str(Path(fastlora.__file__).parent)
TENSORS = ("x", "weight", "lora_a", "lora_b", "bias")
SAMPLE = torch.ones(4, 4)
VALUES = list(wrong_kinds.values())


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


def refused(call, arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(**good() | {"x": LEAF} | arguments)
    assert traceback.extract_tb(caught.tb)[-1].filename.startswith(PACKAGE), "an error of torch's"
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@CALLS
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kind", [kind for kind in VALUES if "tensor" not in kind])
def test_no_tensor(name, kind, call):
    value = wrong_kinds.values()[kind]
    if name == "bias" and value is None:
        assert call(**good() | {"x": LEAF, "bias": None}).shape == (2, 6)
        return
    refused(call, {name: value}, rf"{name} must be a tensor.*, not {type(value).__name__}")


@CALLS
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in TENSORS
        for kind in wrong_kinds.tensors_like(SAMPLE)
        if name != "x" or kind not in ("nested", "jagged")  # tests/test_torch_s_own.py
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_another_kind_of_tensor(name, kind, call, backend):
    refused(
        call,
        {name: wrong_kinds.tensors_like(good()[name])[kind]},
        rf"\b{name} (is|has)\b.*(must|move|make|call)",
    )


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kind", wrong_kinds.others_like(SAMPLE))
def test_a_kind_of_tensor_that_works(name, kind, backend):
    arguments = good()
    expected = fastlora.reference.lora_linear(**arguments)
    arguments[name] = wrong_kinds.others_like(arguments[name])[kind]
    torch.testing.assert_close(forward(**arguments).as_subclass(Tensor), expected)


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias"])
def test_no_backward_keeps_an_inference_tensor(name, backend):
    tensor = wrong_kinds.others_like(good()[name])["inference"]
    refused(with_gradients, {name: tensor}, f"{name} was made in inference mode.*clone it")


@pytest.mark.parametrize("name", ["x", "dy"])
def test_a_negated_view_in_the_backward(name, backend):
    """Its memory has the other sign, and the kernels read memory."""
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


@CALLS
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_a_switch_and_a_name(name, kind, call):
    """Numbers are Python's, and numpy.float64 is one."""
    value = wrong_kinds.values()[kind]
    if kind in NUMBERS[name]:
        assert call(**good() | {"x": LEAF, name: value}).shape == (2, 6)
    else:
        refused(call, {name: value}, f"^{name} (is|asks for) .*(must|there is only)")


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


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_group(group):
    refused(
        lambda **good: fastlora.lora_linears(good["x"], group),
        {},
        r"must be a list|no projections came: give|must be an Output",
    )


LAYER = {
    "r": {"two"},
    "lora_alpha": {"zero", "two", "half", "negative", "numpy-float64"},
    "lora_dropout": {"zero", "half", "numpy-float64"},
    "use_rslora": {"true", "false"},
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", LAYER)
def test_a_layer_s_settings(name, kind):
    """The others are nn.Linear's."""
    linear = nn.Linear(8, 6)
    for make in (
        lambda **settings: LoRALinear(8, 6, **settings),
        lambda **settings: LoRALinear.from_linear(linear, **{"r": 2, "lora_alpha": 4} | settings),
    ):
        setting = {name: wrong_kinds.values()[kind]}
        if kind in LAYER[name]:
            assert make(**setting)(torch.ones(2, 8)).shape == (2, 6)
        else:
            with pytest.raises(ValueError, match=rf"^{name} is .* must "):
                make(**setting)
            assert linear.weight.requires_grad
        linear.requires_grad_(True)


@pytest.mark.parametrize("kind", VALUES)
def test_no_linear_layer_to_adapt(kind):
    linear = wrong_kinds.values()[kind]
    if kind == "module":
        assert LoRALinear.from_linear(linear, r=1, lora_alpha=1)(torch.ones(1)).shape == (1,)
        return
    with pytest.raises(ValueError, match=rf"it is a {type(linear).__name__}, no torch.nn.Linear"):
        LoRALinear.from_linear(linear, r=1, lora_alpha=1)


@pytest.mark.parametrize("kind", VALUES)
def test_no_name_of_a_backend(kind):
    with pytest.raises(
        ValueError, match=r"^use_backend asks for .* there is only 'torch', 'triton'"
    ):
        fastlora.use_backend(wrong_kinds.values()[kind]).__enter__()


def test_kernels_never_see_a_tensor_without_memory(recwarn):
    """A FakeTensor's data_ptr() is 0, with a warning of torch's."""
    fake = wrong_kinds.tensors_like(good()["weight"])["fake"]
    with fastlora.use_backend("triton"):
        refused(forward, {"weight": fake}, "weight is a FakeTensor, but x is a Tensor")
    assert not [w for w in recwarn if "data pointer" in str(w.message)]
