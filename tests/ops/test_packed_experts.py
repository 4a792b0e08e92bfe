"""Rows of experts whose weights are packed: those of the dequantised stack, and what is kept."""

import pytest
import torch
from experts import Experts, call, check_against_oracle, ends_of, make_experts, make_rows
from judge import USUAL_DTYPES
from memory import saved_bytes
from packed import random_affine, random_float8, random_four_bit, random_int8, stack
from pairs import pairwise

from fastlora.formats.format import Quantised

pytestmark = pytest.mark.usefixtures("backend", "poisoned_memory")

N, K = 24, 32
MAKERS = {
    "nf4": lambda: random_four_bit(N, K, "nf4", 16),
    "nf4 nested": lambda: random_four_bit(N, K, "nf4", 16, nested=2),
    "nf4 across rows": lambda: random_four_bit(N, K, "nf4", 64),
    "float8 blocks": lambda: random_float8(N, K, 8, 16, scale=torch.float32),
    "float8 ragged blocks": lambda: random_float8(N, K, 16, 16, scale=torch.float32),
    "float8 rows e8m0": lambda: random_float8(N, K, 1, K),
    "float8 tensor": lambda: random_float8(N, K, N, K, scale=torch.bfloat16),
    "int8 rows": lambda: random_int8(N, K),
    "affine": lambda: random_affine(N, K, 1, 16),
}
COUNTS = {"some": [5, 0, 9, 1], "one": [0, 0, 8, 0], "none": [0, 0, 0, 0], "many": [70, 3, 80, 90]}


def packed_experts(name: str, dtype, adapter_dtype=None, bias=True, r=3, count=4) -> Experts:
    plain = make_experts(count, N, K, r, dtype, adapter_dtype, bias)
    return plain._replace(weight=stack([MAKERS[name]() for _ in range(count)]))


@pairwise(
    {
        "name": {name: name for name in MAKERS},
        "dtype,adapter_dtype": USUAL_DTYPES,
        "counts": COUNTS,
        "p": [0.0, 0.2],
    }
)
def test_against_the_dequantised_stack(name, dtype, adapter_dtype, counts, p):
    """With rows behind the last end."""
    torch.manual_seed(0)
    experts = packed_experts(name, dtype, adapter_dtype)
    check_against_oracle(make_rows(sum(counts) + 3, K, dtype), experts, ends_of(counts), p)


def test_what_is_kept(backend):
    """x, h and the packed tensors; nothing dense."""
    experts = packed_experts("float8 blocks", torch.float32, bias=False)
    x, ends = make_rows(40, K, torch.float32), ends_of([20, 0, 15, 5])
    own = [x, experts.lora_a, experts.lora_b, *experts.weight.tensors, ends]
    saved = saved_bytes(lambda: call(x, experts, ends), own)
    assert sum(saved.values()) == 40 * 3 * 4


def test_packed_by_one_expert_less():
    experts = packed_experts("int8 rows", torch.float32)
    codes, scales = experts.weight.tensors
    x, ends = make_rows(9, K, torch.float32), ends_of([3, 3, 3, 0])
    for tensors, words in (
        ((codes, scales[:3]), "of .* experts"),
        ((codes[:, :-1], scales), "weight is no int8"),
        ((codes.mT.contiguous().mT, scales), "call .contiguous"),
        ((codes[0], scales[0]), "weight has shape"),
        ((codes[None], scales[None]), "weight"),
    ):
        wrong = experts._replace(weight=Quantised(experts.weight.format, tensors))
        with pytest.raises(ValueError, match=words):
            call(x, wrong, ends)
