"""The judge condemns mistakes that LoRA kernels were shipped with."""

import pytest
import torch
from judge import check_against_oracle, make_projection

from fastlora import blocks
from fastlora.backends import formula
from fastlora.backends.dropout import DropoutMask


def check(p: float = 0.3, dtype: torch.dtype = torch.bfloat16) -> None:
    x = torch.randn(40, 24).to(dtype).requires_grad_()
    check_against_oracle(x, [make_projection(17, 24, 4, dtype, torch.float32, bias=True)], p)


def test_the_right_backend_passes():
    check()


def change_the_backward_s_mask(monkeypatch, change) -> None:
    through = formula._through_lora_a
    monkeypatch.setattr(
        formula,
        "_through_lora_a",
        lambda x, dh, a, mask, *rest: through(x, dh, a, change(mask), *rest),
    )


def test_another_mask_in_the_backward_fails(monkeypatch):
    another = DropoutMask(torch.tensor([99]), (1000, 24), 0.3)
    change_the_backward_s_mask(monkeypatch, lambda mask: another)
    with pytest.raises(AssertionError, match="d_x"):
        check()


def test_no_mask_in_the_backward_fails(monkeypatch):
    change_the_backward_s_mask(monkeypatch, lambda mask: None)
    with pytest.raises(AssertionError, match="d_x"):
        check()


@pytest.mark.parametrize("factor", [1.01, 0.9])
def test_a_forgotten_share_of_the_scale_fails(monkeypatch, factor):
    product = formula.product
    monkeypatch.setattr(
        formula,
        "product",
        lambda left, right, scale, out=None: product(left, right, scale * factor, out),
    )
    with pytest.raises(AssertionError, match="y0"):
        check(dtype=torch.float32)


def test_a_mask_that_depends_on_the_block_fails(monkeypatch):
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 24 * 8)
    drop = DropoutMask.drop
    monkeypatch.setattr(DropoutMask, "drop", lambda self, first, *pairs: drop(self, 0, *pairs))
    with pytest.raises(AssertionError, match="y0"):
        check()
