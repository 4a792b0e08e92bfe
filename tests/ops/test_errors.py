"""Invalid input to any function or layer raises an error that names the value and the valid ones.

Values that aren't tensors, numbers or lists at all are tested in test_door.py, for lora_linear.
"""

import pytest
import torch
from torch import ones

import fastlora
from fastlora import AdapterMapping


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BIAS = {"bias": ones(5)}
GOOD = {
    "linear": {"x": ones(6, 8), "weight": ones(5, 8), "lora_a": ones(2, 8), "lora_b": ones(5, 2)}
    | BIAS,
    "grouped": {"x": ones(6, 8), "weight": ones(3, 5, 8), "lora_a": ones(3, 2, 8)}
    | {"lora_b": ones(3, 5, 2), "offsets": int32(2, 2, 5), "bias": ones(3, 5)},
    "multi": {"x": ones(4, 3, 8), "weight": ones(5, 8), "lora_a": ones(3, 2, 8)}
    | {"lora_b": ones(3, 5, 2), "adapter_indices": int32(0, -1, 2, 1)}
    | {"scales": [1.0, 2.0, 0.5]}
    | BIAS,
}
DOORS = {
    "linear": fastlora.lora_linear,
    "grouped": fastlora.grouped_lora_linear,
    "multi": fastlora.multi_lora_linear,
}
# By function: the changes to a valid call, and a part of the error message.
TYPE_ERRORS = {
    "linear": {
        "weight-dtype": ({"weight": ones(5, 8).half()}, "weight has dtype torch.float16"),
        "lora_a-integer": ({"lora_a": ones(2, 8).to(torch.int8)}, "lora_a has dtype torch.int8"),
    },
    "grouped": {
        "x-list": ({"x": [1.0]}, "x must be a tensor, not list"),
        "x-nested": ({"x": torch.nested.nested_tensor([ones(6, 8)])}, "x is nested"),
        "weight-none": ({"weight": None}, "weight must be a tensor, not NoneType"),
        "offsets-list": ({"offsets": [2, 2, 5]}, "offsets must be a tensor, not list"),
        "offsets-int64": ({"offsets": int32(2, 2, 5).long()}, r"int64.*offsets.to\(torch.int32\)"),
        "offsets-sparse": ({"offsets": int32(2, 2, 5).to_sparse()}, "layout torch.sparse_coo"),
    },
    "multi": {
        "indices-fractions": ({"adapter_indices": [0.7, 1.2, 0.0, 1.0]}, "a list of whole numbers"),
        "a-bank-and-a-list": (
            {"lora_a": [ones(2, 8)] * 3},
            "list and Tensor, but must both be banks",
        ),
        "lists-of-lists": ({"lora_a": [[1.0]], "lora_b": [[1.0]]}, "lora_a must be a tensor"),
        "indices-none": (
            {"adapter_indices": None},
            "adapter_indices is None, but must be an int32",
        ),
        "indices-float": ({"adapter_indices": ones(4)}, "adapter_indices has dtype torch.float32"),
        "scales-number": ({"scales": 1.0}, r"scales must be a list or a tensor, .* not 1.0"),
        "dropout-none": ({"dropout": None}, "dropout must be a list"),
    },
}
VALUE_ERRORS = {
    "linear": {
        "x-features": ({"x": ones(2, 9)}, r"weight has shape \(5, 8\), but x has 9 features"),
        "lora_a-features": ({"lora_a": ones(2, 7)}, r"lora_a must be \[r, 8\]"),
        "lora_b-rank": ({"lora_b": ones(5, 4)}, r"lora_b must be \[5, 2\]"),
        "bias-length": ({"bias": ones(4)}, r"bias must be \[5\]"),
        "rank-0": ({"lora_a": ones(0, 8), "lora_b": ones(5, 0)}, "at least 1"),
        "scale-large": ({"scale": 1e39}, r"scale is 1e\+39"),
        "weight-device": (
            {"weight": ones(5, 8, device="meta")},
            "weight is on meta, but x is on cpu",
        ),
    },
    "grouped": {
        "x-1d": ({"x": ones(8)}, r"x has shape \(8,\), but must be \[rows, in_features\]"),
        "x-features": ({"x": ones(6, 9)}, r"weight must be \[experts, out_features, 9\]"),
        "weight-2d": ({"weight": ones(5, 8)}, r"weight has shape \(5, 8\)"),
        "no-experts": ({"weight": ones(0, 5, 8)}, "each at least 1"),
        "lora_a-experts": ({"lora_a": ones(2, 2, 8)}, r"lora_a must be \[3, r, 8\]"),
        "bias-of-one": ({"bias": ones(5)}, r"bias must be \[3, 5\]"),
        "offsets-short": ({"offsets": int32(2, 5)}, r"offsets must be \[3\]"),
        "offsets-from-0": ({"offsets": int32(0, 2, 2, 5)}, r"offsets must be \[3\]"),
        "offsets-decreasing": ({"offsets": int32(3, 2, 5)}, r"offsets are \[3, 2, 5\]"),
        "offsets-negative": ({"offsets": int32(-1, 2, 5)}, r"offsets are \[-1, 2, 5\]"),
        "offsets-too-large": ({"offsets": int32(2, 2, 7)}, "none above 6, the rows of x"),
        "offsets-device": ({"offsets": int32(2, 2, 5).to("meta")}, "offsets is on meta"),
    },
    "multi": {
        "x-features": ({"x": ones(4, 9)}, r"weight must be \[out_features, 9\]"),
        "bank-2d": ({"lora_a": ones(6, 8)}, r"a bank must be dense, \[adapters, r, K\]"),
        "banks-unlike": ({"lora_a": ones(2, 2, 8)}, "2 adapters and lora_b 3"),
        "empty-lists": ({"lora_a": [], "lora_b": []}, "at least 1"),
        "a-later-adapter": (
            {"lora_a": [ones(2, 8)] * 3, "lora_b": [ones(5, 2)] * 2 + [ones(5, 3)]},
            r"adapter 2: lora_b has shape \(5, 3\)",
        ),
        "indices-few": ({"adapter_indices": [0, 1]}, r"adapter_indices has shape \(2,\)"),
        "indices-rows-and-features": (
            {"adapter_indices": torch.zeros(4, 3, 8).int()},
            r"\(4,\) \(a sequence each\) to \(4, 3\)",
        ),
        "indices-too-large": ({"adapter_indices": [0, 1, 2, 3]}, r"must be -1 \(none\) or 0 to 2"),
        "indices-too-small": ({"adapter_indices": [0, 1, -2, 2]}, "numbers beyond the adapters"),
        "indices-meta": ({"adapter_indices": torch.zeros(4, device="meta").int()}, "is on meta"),
        "mapping-of-others": (
            {"adapter_indices": AdapterMapping([0, 1, -1, 0], 2)},
            "a mapping of 2 adapters, but there are 3",
        ),
        "scales-few": ({"scales": [1.0]}, r"scales has shape \(1,\), but there are 3 adapters"),
        "scales-sparse": ({"scales": ones(3).to_sparse()}, r"scales has shape \(3,\) .*sparse_coo"),
        "scales-trained": ({"scales": ones(3, requires_grad=True)}, "require a gradient"),
        "scales-nan": ({"scales": [1.0, float("nan"), 1.0]}, "scale is nan"),
        "ranks-zero": ({"ranks": [1, 0, 2]}, r"ranks\[1\] is 0, but must be a whole number from 1"),
        "ranks-large": ({"ranks": torch.tensor([1, 2, 3])}, r"ranks\[2\] is 3"),
        "dropout-one": ({"dropout": 1.0}, r"dropout is 1.0, but must lie in \[0, 1\)"),
        "dropout-few": ({"dropout": [0.1]}, r"dropout has shape \(1,\)"),
    },
}
CASES = {
    f"{door}-{name}": (door, error, *case)
    for error, doors in ((TypeError, TYPE_ERRORS), (ValueError, VALUE_ERRORS))
    for door, cases in doors.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(("door", "error", "changes", "message"), CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_arguments_that_do_not_fit(door, error, changes, message):
    # caches the valid call first: the invalid one must not count as the same kind
    DOORS[door](**GOOD[door])
    with pytest.raises(error, match=message):
        DOORS[door](**GOOD[door] | changes)


def test_a_huge_whole_number_is_a_scale():
    assert fastlora.lora_linear(**GOOD["linear"], scale=2**70).isfinite().all()


def test_a_failed_call_draws_nothing():
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="offsets are"):
        fastlora.grouped_lora_linear(**GOOD["grouped"] | {"offsets": int32(3, 2, 5)}, dropout=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_offsets_of_a_compiled_call():
    compiled = torch.compile(fastlora.grouped_lora_linear, backend="aot_eager", fullgraph=True)
    good = GOOD["grouped"]
    assert compiled(**good).shape == (6, 5)
    with pytest.raises(ValueError, match=r"offsets are \[3, 2, 5\]"):
        compiled(**good | {"offsets": int32(3, 2, 5)})


def test_offsets_of_another_class():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(int32(2, 2, 5))
    with pytest.raises(TypeError, match="offsets is a FakeTensor, but x is a Tensor"):
        fastlora.grouped_lora_linear(**GOOD["grouped"] | {"offsets": fake})
