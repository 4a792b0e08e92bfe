"""Bad input to lora_grouped: an error at the door that says what came and what fits."""

import math

import pytest
import torch
from experts import call, ends_of, make_experts, make_rows
from torch import ones

import fastlora


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(**changes):
    good = {"x": ones(6, 8), "weight": ones(3, 5, 8), "lora_a": ones(3, 2, 8)}
    good |= {"lora_b": ones(3, 5, 2), "offsets": int32(2, 2, 5), "bias": ones(3, 5)}
    return good | {"scale": 1.0, "dropout": 0.0} | changes


TYPE_ERRORS = {
    "x-list": ({"x": [1.0]}, "x must be a tensor, not list"),
    "x-integer": ({"x": ones(6, 8, dtype=torch.int64)}, "x has dtype torch.int64"),
    "x-sparse": ({"x": ones(6, 8).to_sparse()}, "x has layout torch.sparse_coo"),
    "x-nested": ({"x": torch.nested.nested_tensor([ones(6, 8)])}, "x is nested"),
    "weight-none": ({"weight": None}, "weight must be a tensor, not NoneType"),
    "weight-dtype": ({"weight": ones(3, 5, 8).half()}, "weight has dtype torch.float16"),
    "lora_a-list": ({"lora_a": [ones(2, 8)] * 3}, "lora_a must be a tensor, not list"),
    "lora_a-integer": ({"lora_a": ones(3, 2, 8).to(torch.int8)}, "lora_a has dtype torch.int8"),
    "lora_b-sparse": ({"lora_b": ones(3, 5, 2).to_sparse()}, "lora_b has layout"),
    "bias-list": ({"bias": [0.0]}, "bias must be a tensor or None, not list"),
    "offsets-list": ({"offsets": [2, 2, 5]}, "offsets must be a tensor, not list"),
    "offsets-none": ({"offsets": None}, "offsets must be a tensor, not NoneType"),
    "offsets-int64": ({"offsets": int32(2, 2, 5).long()}, r"int64.*offsets.to\(torch.int32\)"),
    "offsets-float": ({"offsets": ones(3)}, "offsets has dtype torch.float32"),
    "offsets-bool": ({"offsets": ones(3).bool()}, "offsets has dtype torch.bool"),
    "offsets-sparse": ({"offsets": int32(2, 2, 5).to_sparse()}, "layout torch.sparse_coo"),
}
VALUE_ERRORS = {
    "x-1d": ({"x": ones(8)}, r"x has shape \(8,\), but must be \[rows, in_features\]"),
    "x-3d": ({"x": ones(2, 3, 8)}, r"x has shape \(2, 3, 8\)"),
    "x-scalar": ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
    "x-features": ({"x": ones(6, 9)}, r"weight must be \[experts, out_features, 9\]"),
    "weight-2d": ({"weight": ones(5, 8)}, r"weight has shape \(5, 8\)"),
    "weight-transposed": ({"weight": ones(3, 8, 5)}, r"weight has shape \(3, 8, 5\)"),
    "no-experts": ({"weight": ones(0, 5, 8)}, "each at least 1"),
    "no-features": ({"x": ones(6, 0), "weight": ones(3, 5, 0)}, "each at least 1"),
    "lora_a-2d": ({"lora_a": ones(6, 8)}, r"lora_a must be \[3, r, 8\]"),
    "lora_a-experts": ({"lora_a": ones(2, 2, 8)}, r"lora_a must be \[3, r, 8\]"),
    "lora_a-transposed": ({"lora_a": ones(3, 8, 2)}, r"lora_a must be \[3, r, 8\]"),
    "rank-0": ({"lora_a": ones(3, 0, 8), "lora_b": ones(3, 5, 0)}, "r 0 must each be at least 1"),
    "lora_b-rank": ({"lora_b": ones(3, 5, 3)}, r"lora_b must be \[3, 5, 2\]"),
    "lora_b-peft": ({"lora_b": ones(5, 6)}, r"lora_b must be \[3, 5, 2\]"),
    "lora_b-transposed": ({"lora_b": ones(3, 2, 5)}, r"lora_b must be \[3, 5, 2\]"),
    "bias-of-one": ({"bias": ones(5)}, r"bias must be \[3, 5\]"),
    "bias-experts": ({"bias": ones(2, 5)}, r"bias must be \[3, 5\]"),
    "offsets-short": ({"offsets": int32(2, 5)}, r"offsets must be \[3\]"),
    "offsets-from-0": ({"offsets": int32(0, 2, 2, 5)}, r"offsets must be \[3\]"),
    "offsets-2d": ({"offsets": int32(2, 2, 5)[None]}, r"offsets must be \[3\]"),
    "offsets-decreasing": ({"offsets": int32(3, 2, 5)}, r"offsets are \[3, 2, 5\]"),
    "offsets-negative": ({"offsets": int32(-1, 2, 5)}, r"offsets are \[-1, 2, 5\]"),
    "offsets-too-large": ({"offsets": int32(2, 2, 7)}, "none above 6, the rows of x"),
    "offsets-device": ({"offsets": int32(2, 2, 5).to("meta")}, "offsets is on meta"),
    "weight-device": ({"weight": ones(3, 5, 8, device="meta")}, "weight is on meta"),
    "lora_b-device": ({"lora_b": ones(3, 5, 2, device="meta")}, "lora_b is on meta"),
    "scale-nan": ({"scale": math.nan}, "scale is nan"),
    "scale-text": ({"scale": "2"}, "scale is '2'"),
    "scale-bool": ({"scale": True}, "scale is True"),
    "dropout-1": ({"dropout": 1.0}, r"\[0, 1\)"),
    "dropout-nan": ({"dropout": math.nan}, r"\[0, 1\)"),
    "training": ({"training": 1}, "training is 1, but must be True or False"),
    "backend": ({"backend": "cuda"}, "backend 'cuda', but there is only 'torch'"),
}
NAMES = pytest.mark.parametrize("name", [*TYPE_ERRORS, *VALUE_ERRORS])


@NAMES
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_door(name):
    changes, message = (TYPE_ERRORS | VALUE_ERRORS)[name]
    error = TypeError if name in TYPE_ERRORS else ValueError
    with pytest.raises(error, match=message):
        fastlora.lora_grouped(**arguments(**changes))


@pytest.mark.parametrize("name", ["x-list", "weight-none", "offsets-int64", "offsets-decreasing"])
def test_door_under_autocast(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        test_door(name)


def test_without_changes_it_is_fine():
    assert fastlora.lora_grouped(**arguments()).shape == (6, 5)


def test_a_failed_call_draws_nothing():
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="offsets are"):
        fastlora.lora_grouped(**arguments(offsets=int32(3, 2, 5), dropout=0.5))
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_offsets_of_a_compiled_call():
    compiled = torch.compile(fastlora.lora_grouped, backend="aot_eager", fullgraph=True)
    good = arguments()
    del good["scale"], good["dropout"]
    assert compiled(**good).shape == (6, 5)
    with pytest.raises(ValueError, match=r"offsets are \[3, 2, 5\]"):
        compiled(**good | {"offsets": int32(3, 2, 5)})


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias"])
def test_no_backward_keeps_an_inference_tensor(name):
    with torch.inference_mode():
        made = arguments()[name].clone()
    good = arguments(**{name: made})
    good["lora_a" if name != "lora_a" else "lora_b"].requires_grad_()
    with pytest.raises(TypeError, match=f"{name} was made in inference mode.*clone it"):
        fastlora.lora_grouped(**good)


def test_offsets_of_another_class():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(int32(2, 2, 5))
    with pytest.raises(TypeError, match="offsets is a FakeTensor, but x is a Tensor"):
        fastlora.lora_grouped(**arguments(offsets=fake))


def test_parameters_do():
    experts = make_experts(2, 8, 8, 2, torch.float32)
    experts = type(experts)(*[torch.nn.Parameter(t) for t in experts[:3]])
    x = make_rows(4, 8, torch.float32)
    assert call(x, experts, torch.nn.Parameter(ends_of([2, 2]), False)).requires_grad
