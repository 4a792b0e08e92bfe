"""Bad input to multi_lora_linear: an error at the door that says what came and what fits."""

import pytest
import torch
from torch import ones

import fastlora
from fastlora import AdapterMapping


def arguments(**changes):
    good = {"x": ones(4, 3, 8), "weight": ones(5, 8), "lora_a": ones(3, 2, 8)}
    good |= {"lora_b": ones(3, 5, 2), "adapter_indices": torch.tensor([0, -1, 2, 1])}
    return good | {"scales": [1.0, 2.0, 0.5], "bias": ones(5)} | changes


TYPE_ERRORS = {
    "indices-fractions": ({"adapter_indices": [0.7, 1.2, 0.0, 1.0]}, "a list of whole numbers"),
    "x-list": ({"x": [1.0]}, "x must be a tensor, not list"),
    "x-integer": ({"x": ones(4, 3, 8).int()}, "x has dtype torch.int32"),
    "x-nested": ({"x": torch.nested.nested_tensor([ones(6, 8)])}, "x is nested"),
    "weight-dtype": ({"weight": ones(5, 8).half()}, "weight has dtype torch.float16"),
    "a-bank-and-a-list": ({"lora_a": [ones(2, 8)] * 3}, "list and Tensor, but must both be banks"),
    "lists-of-lists": ({"lora_a": [[1.0]], "lora_b": [[1.0]]}, "lora_a must be a tensor"),
    "no-adapters": ({"lora_a": None, "lora_b": None}, "must both be banks"),
    "lora_a-integer": ({"lora_a": ones(3, 2, 8).int()}, "lora_a has dtype torch.int32"),
    "indices-none": ({"adapter_indices": None}, "adapter_indices is None, but must be an int32"),
    "indices-names": ({"adapter_indices": ["a"]}, "a list of whole numbers"),
    "indices-float": ({"adapter_indices": ones(4)}, "adapter_indices has dtype torch.float32"),
    "indices-bool": ({"adapter_indices": ones(4).bool()}, "adapter_indices has dtype torch.bool"),
    "scales-number": ({"scales": 1.0}, r"scales must be a list or a tensor, .* not 1.0"),
    "dropout-none": ({"dropout": None}, "dropout must be a list"),
}
VALUE_ERRORS = {
    "x-features": ({"x": ones(4, 9)}, r"weight must be \[out_features, 9\]"),
    "x-scalar": ({"x": torch.tensor(1.0)}, "x is a scalar"),
    "bank-2d": ({"lora_a": ones(6, 8)}, r"a bank must be dense, \[adapters, r, K\]"),
    "banks-unlike": ({"lora_a": ones(2, 2, 8)}, "2 adapters and lora_b 3"),
    "empty-lists": ({"lora_a": [], "lora_b": []}, "at least 1"),
    "bank-features": ({"lora_a": ones(3, 2, 9)}, r"lora_a must be \[r, 8\]"),
    "bank-rank": ({"lora_b": ones(3, 5, 3)}, r"lora_b must be \[5, 2\]"),
    "a-later-adapter": (
        {"lora_a": [ones(2, 8)] * 3, "lora_b": [ones(5, 2)] * 2 + [ones(5, 3)]},
        r"adapter 2: lora_b has shape \(5, 3\)",
    ),
    "a-later-device": (
        {"lora_a": [ones(2, 8), ones(2, 8, device="meta"), ones(2, 8)]}
        | {"lora_b": [ones(5, 2)] * 3},
        "lora_a is on meta, but x is on cpu",
    ),
    "bias": ({"bias": ones(4)}, r"bias must be \[5\]"),
    "indices-few": ({"adapter_indices": [0, 1]}, r"adapter_indices has shape \(2,\)"),
    "indices-rows-and-features": (
        {"adapter_indices": torch.zeros(4, 3, 8).int()},
        r"\(4,\) \(a sequence each\) to \(4, 3\)",
    ),
    "indices-scalar": ({"adapter_indices": torch.tensor(0)}, r"adapter_indices has shape \(\)"),
    "indices-too-large": ({"adapter_indices": [0, 1, 2, 3]}, r"must be -1 \(none\) or 0 to 2"),
    "indices-too-small": ({"adapter_indices": [0, 1, -2, 2]}, "numbers beyond the adapters"),
    "indices-meta": ({"adapter_indices": torch.zeros(4, device="meta").int()}, "is on meta"),
    "mapping-of-others": (
        {"adapter_indices": AdapterMapping([0, 1, -1, 0], 2)},
        "a mapping of 2 adapters, but there are 3",
    ),
    "scales-few": ({"scales": [1.0]}, r"scales has shape \(1,\), but there are 3 adapters"),
    "scales-2d": ({"scales": ones(3, 1)}, r"scales has shape \(3, 1\)"),
    "scales-trained": ({"scales": ones(3, requires_grad=True)}, "require a gradient"),
    "scales-nan": ({"scales": [1.0, float("nan"), 1.0]}, "scale is nan"),
    "scales-infinite": ({"scales": ones(3) * torch.inf}, "scale is inf"),
    "scales-bool": ({"scales": [1.0, True, 1.0]}, "scale is True"),
    "ranks-zero": ({"ranks": [1, 0, 2]}, r"ranks\[1\] is 0, but must be a whole number from 1"),
    "ranks-large": ({"ranks": torch.tensor([1, 2, 3])}, r"ranks\[2\] is 3"),
    "ranks-float": ({"ranks": torch.tensor([1.0, 2.0, 2.0])}, r"ranks\[0\] is 1.0"),
    "dropout-one": ({"dropout": 1.0}, r"dropout is 1.0, but must lie in \[0, 1\)"),
    "dropout-few": ({"dropout": [0.1]}, r"dropout has shape \(1,\)"),
    "dropout-negative": ({"dropout": [0.1, -0.1, 0.0]}, "dropout is -0.1"),
    "training": ({"training": None}, "training is None, but must be True or False"),
}
ERRORS = [(TypeError, TYPE_ERRORS), (ValueError, VALUE_ERRORS)]
CASES = {name: (kind, *case) for kind, cases in ERRORS for name, case in cases.items()}


@pytest.mark.parametrize(("kind", "changes", "message"), CASES.values(), ids=CASES)
def test_error(kind, changes, message):
    with pytest.raises(kind, match=message):
        fastlora.multi_lora_linear(**arguments(**changes))


def test_what_the_others_change_is_right():
    assert fastlora.multi_lora_linear(**arguments()).shape == (4, 3, 5)
