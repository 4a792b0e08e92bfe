"""Every kind of call on both backends: y and every gradient against the float64 oracle.

Most calls are drawn: sizes, layouts, dtypes, packed weights, trainable tensors, and environment.
`--hypothesis-profile=long` draws many others.  The tables below add cases that are drawn too
rarely.
"""

import pytest
import torch
from hypothesis import settings
from marks import pairwise
from random_calls import FORMATS, KINDS, Case, check

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
kinds = pytest.mark.parametrize("kind", KINDS)
DROPOUTS = [0.0, 0.1]
MORE = 25 if settings.get_current_profile_name() == "long" else 1


@kinds
@pytest.mark.parametrize("index", range(40 * MORE))
def test_drawn_calls(kind, index):
    check(Case(1, index, "torch", kind=kind))


@kinds
@pytest.mark.parametrize("index", range(6 * MORE))
def test_drawn_calls_of_the_kernels(kind, index):
    check(Case(2, index, "triton", kind=kind, world="eager"))


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_many_adapters_some_without_rows(index, name):
    check(Case(6, index, name, kind="many", p=0.5, M=6, world="eager", format=""))


@pytest.mark.parametrize("index", [9, 10])  # one output, with one adapter and with two
def test_few_rows_drop_by_the_same_masks(index):
    fixed = {"M": 6, "p": 0.5, "node": False, "wide": False, "world": "eager", "format": ""}
    check(Case(8, index, "torch", kind="layer", dtype=F32, adapter_dtype=F32, **fixed))


@pytest.mark.parametrize("index", [1, 7])  # both have a bias
def test_a_product_in_place_adds_to_the_adapter_and_the_bias(index):
    fixed = {"M": 9, "plan": "IN_PLACE", "world": "eager", "format": "", "node": True}
    check(Case(7, index, "triton", kind="layer", **fixed))


EDGES = {
    "no-rows": {"M": 0},
    "a-row": {"M": 1},
    "few-rows": {"M": 6, "node": False, "wide": False},
    "a-feature": {"K": 1, "format": ""},
    "x-alone": {"alone": "x", "M": 37, "format": ""},
    "weight-alone": {"alone": "weight", "M": 37, "format": ""},
    "bias-alone": {"alone": "bias", "M": 37},
    "lora_a-alone": {"alone": "lora_a", "M": 37},
    "lora_b-alone": {"alone": "lora_b", "M": 37},
}


@pairwise({"kind": [*KINDS], "edge": EDGES, "p": DROPOUTS, "name": ["torch", "triton"]})
def test_edges(kind, edge, p, name):
    check(Case(3, 1, name, **{"kind": kind, "p": p, "world": "eager", "node": True} | edge))


DTYPES = {
    "f64": (F64, F64),
    "f32": (F32, F32),
    "f32-bf16": (F32, BF16),
    "f32-f64": (F32, F64),
    "bf16": (BF16, BF16),
    "bf16-f32": (BF16, F32),
    "bf16-f16": (BF16, F16),
    "f16": (F16, F16),
    "f16-f32": (F16, F32),
}


@pairwise(
    {
        "kind": [*KINDS],
        "dtype,adapter_dtype": DTYPES,
        "p": DROPOUTS,
        "wide": {"wide": True, "native": False},
        "small": {"blocks": True, "": False},
        "M": [8, 9, 70],
    }
)
def test_dtypes(kind, dtype, adapter_dtype, p, wide, small, M):
    """Slow and fast 16-bit products on a CPU, in blocks of rows, also at the blocks' edges."""
    fixed = {"kind": kind, "p": p, "M": M, "world": "eager", "node": True, "format": ""}
    dtypes = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    check(Case(4, 0, "torch", wide=wide, small=small, **dtypes, **fixed))


@pairwise(
    {
        "kind": [*KINDS],
        "format": [*FORMATS],
        "dtype": {"f32": F32, "bf16": BF16},
        "wide": {"wide": True, "native": False},
        "p": DROPOUTS,
    }
)
def test_packed_weights(kind, format, dtype, wide, p):
    fixed = {"kind": kind, "format": format, "p": p, "world": "eager", "M": 30, "node": True}
    check(Case(5, 0, "torch", dtype=dtype, wide=wide, small=True, **fixed))
