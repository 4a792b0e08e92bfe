"""Bad input to an op or a layer: an error at the door that says what came and what fits."""

import math

import pytest
import torch
from torch import nn, ones

import fastlora


def arguments(**changes):
    good = {"x": ones(2, 8), "weight": ones(6, 8), "lora_a": ones(3, 8), "lora_b": ones(6, 3)}
    return good | {"bias": ones(6), "scale": 1.0, "dropout": 0.0} | changes


TYPE_ERRORS = {
    "x-list": ({"x": [1.0]}, "x must be a tensor, not list"),
    "x-float8": ({"x": ones(2, 8).to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
    "x-integer": ({"x": ones(2, 8, dtype=torch.int64)}, "torch.int64"),
    "x-complex": ({"x": ones(2, 8, dtype=torch.complex64)}, "complex64"),
    "x-sparse": ({"x": ones(2, 8).to_sparse()}, "layout torch.sparse_coo, but must be dense"),
    "weight-list": ({"weight": [[1.0] * 8]}, "weight must be a tensor, not list"),
    "weight-dtype": ({"weight": ones(6, 8).half()}, "weight has dtype torch.float16"),
    "lora_a-none": ({"lora_a": None}, "lora_a must be a tensor, not NoneType"),
    "lora_a-integer": ({"lora_a": ones(3, 8).to(torch.int8)}, "lora_a has dtype torch.int8"),
}
VALUE_ERRORS = {
    "x-scalar": ({"x": torch.tensor(1.0)}, "x is a scalar"),
    "x-features": ({"x": ones(2, 9)}, r"weight has shape \(6, 8\), but x has 9 features"),
    "weight-1d": ({"weight": ones(8)}, r"weight has shape \(8,\)"),
    "lora_a-features": ({"lora_a": ones(3, 7)}, r"lora_a must be \[r, 8\]"),
    "lora_a-transposed": ({"lora_a": ones(8, 3)}, r"lora_a must be \[r, 8\]"),
    "lora_b-rank": ({"lora_b": ones(6, 4)}, r"lora_b must be \[6, 3\]"),
    "lora_b-transposed": ({"lora_b": ones(3, 6)}, r"lora_b must be \[6, 3\]"),
    "bias-length": ({"bias": ones(5)}, r"bias must be \[6\]"),
    "rank-0": ({"lora_a": ones(0, 8), "lora_b": ones(6, 0)}, "at least 1"),
    "scale-nan": ({"scale": math.nan}, "scale is nan"),
    "scale-inf": ({"scale": math.inf}, "scale is inf"),
    "scale-large": ({"scale": 1e39}, r"scale is 1e\+39"),
    "scale-text": ({"scale": "2"}, "scale is '2'"),
    "dropout-text": ({"dropout": "0.1"}, "dropout is '0.1'"),
    "dropout-1": ({"dropout": 1.0}, r"\[0, 1\)"),
    "dropout-negative": ({"dropout": -0.1}, r"\[0, 1\)"),
    "dropout-nan": ({"dropout": math.nan}, r"\[0, 1\)"),
    "weight-device": ({"weight": ones(6, 8, device="meta")}, "weight is on meta, but x is on cpu"),
    "lora_b-device": ({"lora_b": ones(6, 3, device="meta")}, "lora_b is on meta"),
    "bias-device": ({"bias": ones(6, device="meta")}, "bias is on meta"),
    "backend": ({"backend": "cuda"}, "backend 'cuda', but there is only 'torch'"),
}


@pytest.mark.parametrize("name", [*TYPE_ERRORS, *VALUE_ERRORS])
def test_op(name):
    changes, message = (TYPE_ERRORS | VALUE_ERRORS)[name]
    error = TypeError if name in TYPE_ERRORS else ValueError
    with pytest.raises(error, match=message):
        fastlora.lora_linear(**arguments(**changes))


def test_op_without_changes_is_fine():
    assert fastlora.lora_linear(**arguments()).shape == (2, 6)


def test_a_huge_whole_number_is_a_scale():
    assert fastlora.lora_linear(**arguments(scale=2**70)).isfinite().all()


def test_empty_group():
    with pytest.raises(ValueError, match="no projections"):
        fastlora.lora_linears(torch.randn(2, 8), [])


PROJECTION = fastlora.Projection(ones(6, 8), ones(3, 8), ones(6, 3))


@pytest.mark.parametrize("projections", [PROJECTION, [tuple(PROJECTION)]], ids=["one", "tuples"])
def test_group_of_something_else(projections):
    with pytest.raises(TypeError, match=r"must be a list of fastlora\.Projection"):
        fastlora.lora_linears(ones(2, 8), projections)


def test_unknown_backend_in_the_context_manager():
    with pytest.raises(ValueError, match="use_backend asks for the backend 'metal'"):
        fastlora.use_backend("metal").__enter__()


@pytest.mark.parametrize("r", [0, -1, 2.0, True, None])
def test_layer_rank(r):
    for make in (
        lambda: fastlora.LoRALinear(8, 6, r=r),
        lambda: fastlora.LoRALinear.from_linear(nn.Linear(8, 6), r=r, lora_alpha=8),
        lambda: fastlora.LoRAConfig(r=r),
        lambda: fastlora.LoRAConfig(rank_pattern={"q": r}),
    ):
        with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
            make()


@pytest.mark.parametrize("p", [1.0, -1, math.nan])
def test_layer_dropout(p):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        fastlora.LoRALinear(8, 6, lora_dropout=p)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        fastlora.LoRAConfig(lora_dropout=p)


@pytest.mark.parametrize("projections", [5, None, iter(())])
def test_group_that_is_no_list(projections):
    with pytest.raises(TypeError, match="projections must be a list"):
        fastlora.lora_linears(torch.randn(2, 8), projections)


@pytest.mark.parametrize("name", ["x-list", "weight-list", "lora_a-none", "x-integer"])
def test_op_under_autocast(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        test_op(name)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 10**400, "16", None])
def test_layer_alpha(alpha):
    with pytest.raises(ValueError, match="lora_alpha is"):
        fastlora.LoRALinear(8, 6, lora_alpha=alpha)
    with pytest.raises(ValueError, match="lora_alpha is"):
        fastlora.LoRAConfig(alpha_pattern={"q": alpha})


def test_failed_from_linear_leaves_the_linear_alone():
    linear = nn.Linear(8, 6)
    with pytest.raises(ValueError, match="lora_alpha is"):
        fastlora.LoRALinear.from_linear(linear, r=4, lora_alpha=math.nan)
    assert linear.weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "some"}, "bias is 'some', but must be one of 'none', 'all', 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": "head"}, "must be a list of names"),
        ({"target_modules": [1]}, r"target_modules is \[1\], but must be a list of names"),
        ({"target_modules": {"q": 1}}, "must be a list of names"),
        ({"rank_pattern": ["q"]}, r"rank_pattern is \['q'\], but must map patterns to numbers"),
        ({"rank_pattern": {"*q": 4}}, r"rank_pattern has '\*q': 4: nothing to repeat"),
        ({"alpha_pattern": {"(q": 4}}, "alpha_pattern has '\\(q': 4: missing"),
        ({"task_type": ["SEQ_CLS"]}, "task_type is"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
    ],
)
def test_config(settings, message):
    with pytest.raises(ValueError, match=message):
        fastlora.LoRAConfig(**settings)
