"""The check of random calls (test_numbers.py) finds planted faults."""

import pytest
import torch
from random_calls import Case, check

from fastlora.backends import formula
from fastlora.backends.dropout import DropoutMask

through, product = formula._through_lora_a, formula.product
ANOTHER = DropoutMask(torch.tensor([99]), (1000, 24), 0.3)
FAULTS = {
    "another-mask-in-the-backward": (
        formula, "_through_lora_a", "d_x",
        lambda x, dh, a, mask, *rest: through(x, dh, a, mask and ANOTHER, *rest),
    ),
    "a-hundredth-of-the-scale": (
        formula, "product", "y0",
        lambda left, right, scale, out=None: product(left, right, scale * 1.01, out),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_mistakes_that_kernels_were_shipped_with_are_misses(name, monkeypatch):
    """Each fault makes a call fail that passes without it."""
    place, attribute, said, wrong = FAULTS[name]
    fixed = {"kind": "layer", "p": 0.3, "world": "eager", "format": "", "M": 40, "K": 24}
    case = lambda: Case(0, 1, "torch", small=True, node=True, dtype=torch.float32, **fixed)  # noqa: E731
    check(case())
    monkeypatch.setattr(place, attribute, wrong)
    with pytest.raises(AssertionError, match=said):
        check(case())
