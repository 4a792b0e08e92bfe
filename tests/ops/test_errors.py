"""Bad input to an op or a layer: an error at the door that says what came and what fits."""

import math

import pytest
import torch
from torch import nn

import fastlora


def arguments(**changes):
    good = {
        "x": torch.randn(2, 8),
        "weight": torch.randn(6, 8),
        "lora_a": torch.randn(3, 8),
        "lora_b": torch.randn(6, 3),
        "bias": torch.randn(6),
        "scale": 1.0,
        "dropout": 0.0,
    }
    return good | changes


CASES = {
    "x-list": ({"x": [1.0]}, TypeError, "x must be a tensor, not list"),
    "x-float8": ({"x": torch.ones(2, 8).to(torch.float8_e4m3fn)}, TypeError, "float8_e4m3fn"),
    "x-integer": ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "torch.int64"),
    "x-scalar": ({"x": torch.tensor(1.0)}, ValueError, "x is a scalar"),
    "x-features": (
        {"x": torch.randn(2, 9)},
        ValueError,
        r"weight has shape \(6, 8\), but x has 9 features",
    ),
    "x-complex": ({"x": torch.randn(2, 8, dtype=torch.complex64)}, TypeError, "complex64"),
    "weight-list": ({"weight": [[1.0] * 8]}, TypeError, "weight must be a tensor, not list"),
    "weight-1d": ({"weight": torch.randn(8)}, ValueError, r"weight has shape \(8,\)"),
    "weight-dtype": (
        {"weight": torch.randn(6, 8).half()},
        TypeError,
        "weight has dtype torch.float16",
    ),
    "lora_a-none": ({"lora_a": None}, TypeError, "lora_a must be a tensor, not NoneType"),
    "lora_a-features": ({"lora_a": torch.randn(3, 7)}, ValueError, r"lora_a must be \[r, 8\]"),
    "lora_a-transposed": ({"lora_a": torch.randn(8, 3)}, ValueError, r"lora_a must be \[r, 8\]"),
    "lora_a-integer": (
        {"lora_a": torch.ones(3, 8, dtype=torch.int8)},
        TypeError,
        "lora_a has dtype torch.int8",
    ),
    "lora_b-rank": ({"lora_b": torch.randn(6, 4)}, ValueError, r"lora_b must be \[6, 3\]"),
    "lora_b-transposed": ({"lora_b": torch.randn(3, 6)}, ValueError, r"lora_b must be \[6, 3\]"),
    "bias-length": ({"bias": torch.randn(5)}, ValueError, r"bias must be \[6\]"),
    "rank-0": (
        {"lora_a": torch.randn(0, 8), "lora_b": torch.randn(6, 0)},
        ValueError,
        "at least 1",
    ),
    "scale-nan": ({"scale": math.nan}, ValueError, "scale is nan"),
    "scale-inf": ({"scale": math.inf}, ValueError, "scale is inf"),
    "scale-large": ({"scale": 1e39}, ValueError, r"scale is 1e\+39"),
    "scale-text": ({"scale": "2"}, ValueError, "scale is '2'"),
    "dropout-text": ({"dropout": "0.1"}, ValueError, "dropout is '0.1'"),
    "dropout-1": ({"dropout": 1.0}, ValueError, r"\[0, 1\)"),
    "dropout-negative": ({"dropout": -0.1}, ValueError, r"\[0, 1\)"),
    "dropout-nan": ({"dropout": math.nan}, ValueError, r"\[0, 1\)"),
    "weight-device": (
        {"weight": torch.randn(6, 8, device="meta")},
        ValueError,
        "weight is on meta, but x is on cpu",
    ),
    "lora_b-device": (
        {"lora_b": torch.randn(6, 3, device="meta")},
        ValueError,
        "lora_b is on meta",
    ),
    "bias-device": ({"bias": torch.randn(6, device="meta")}, ValueError, "bias is on meta"),
    "backend": ({"backend": "cuda"}, ValueError, "backend 'cuda', but there is only 'torch'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), CASES.values(), ids=CASES)
def test_op(changes, error, message):
    with pytest.raises(error, match=message):
        fastlora.lora_linear(**arguments(**changes))


def test_op_without_changes_is_fine():
    assert fastlora.lora_linear(**arguments()).shape == (2, 6)


def test_sparse_x():
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo, but must be dense"):
        fastlora.lora_linear(**arguments(x=torch.randn(2, 8).to_sparse()))


def test_a_huge_whole_number_is_a_scale():
    assert fastlora.lora_linear(**arguments(scale=2**70)).isfinite().all()


def test_empty_group():
    with pytest.raises(ValueError, match="no projections"):
        fastlora.lora_linears(torch.randn(2, 8), [])


@pytest.mark.parametrize("wrong", ["projection", "tuples"])
def test_group_of_something_else(wrong):
    projection = fastlora.Projection(torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3))
    with pytest.raises(TypeError, match=r"must be a list of fastlora\.Projection"):
        fastlora.lora_linears(
            torch.randn(2, 8), projection if wrong == "projection" else [tuple(projection)]
        )


def test_unknown_backend_in_the_context_manager():
    with (
        pytest.raises(ValueError, match="use_backend asks for the backend 'metal'"),
        fastlora.use_backend("metal"),
    ):
        pass


@pytest.mark.parametrize("r", [0, -1, 2.0, True, None])
def test_layer_rank(r):
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        fastlora.LoRALinear(8, 6, r=r)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        fastlora.LoRALinear.from_linear(nn.Linear(8, 6), r=r, lora_alpha=8)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        fastlora.LoRAConfig(r=r)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        fastlora.LoRAConfig(rank_pattern={"q": r})


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 1.0}, {"lora_dropout": -1}, {"lora_dropout": math.nan}]
)
def test_layer_dropout(settings):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        fastlora.LoRALinear(8, 6, **settings)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        fastlora.LoRAConfig(**settings)


@pytest.mark.parametrize("projections", [5, None, iter(())])
def test_group_that_is_no_list(projections):
    with pytest.raises(TypeError, match="projections must be a list"):
        fastlora.lora_linears(torch.randn(2, 8), projections)


@pytest.mark.parametrize("name", ["x-list", "weight-list", "lora_a-none", "x-integer"])
def test_op_under_autocast(name):
    changes, error, message = CASES[name]
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(error, match=message):
        fastlora.lora_linear(**arguments(**changes))


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
