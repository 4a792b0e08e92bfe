"""row_loss: each row's cross-entropy, and its gradient in place of the logits, against float64."""

import judge
import pytest
import torch
from kernel_cases import BF16, DEVICE, F32, counted_launches, dtypes, random
from torch import Tensor

import fastlora
from fastlora.backends import torch as torch_backend
from fastlora.backends import triton
from fastlora.backends.loss import _rows_of_chunk
from fastlora.backends.protocol import LossSettings
from fastlora.kernels.row_loss import row_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SETTINGS = {
    "plain": LossSettings(), "smoothing": LossSettings(0.1), "only-smoothing": LossSettings(1.0),
    "softcap": LossSettings(softcap=3.0), "wide-softcap": LossSettings(softcap=1000.0),
    "scale": LossSettings(logit_scale=-0.5), "z-loss": LossSettings(z_loss=0.01),
    "all": LossSettings(0.1, 3.0, 2.0, 0.01),
}  # fmt: skip
PLAIN, ALL = SETTINGS["plain"], SETTINGS["all"]
settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def operands(m: int, v: int, dtype=F32, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Logits, and classes with the last and the first among them."""
    target = torch.randint(0, v, (m,), device=DEVICE)
    target[:1], target[1:2] = v - 1, 0
    return random(m, v, dtype, layout).mul_(3.0), target


@dtypes
@settings
def test_any_settings(settings, dtype):
    for upstream in (None, random(1, 3)[0]):
        judge.check_row_loss(row_loss, *operands(3, 1027, dtype), settings, upstream)


@pytest.mark.parametrize("v", [1, 2, 5, 1000, 1027, 4096, 4097, 9001])
@pytest.mark.parametrize("layout", ["window", "odd", "every-second-row"])
def test_any_shape_and_stride(layout, v):
    """Nothing beside the rows is written."""
    for m in (1, 3):
        z, target = operands(m, v, BF16, layout)
        around = z._base.isnan().sum()
        judge.check_row_loss(row_loss, z, target, ALL)
        assert z._base.isnan().sum() == around


@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_a_number_added_to_every_logit_changes_no_result(shift):
    z, target = operands(3, 5000)
    judge.check_row_loss(row_loss, z.add_(shift), target, PLAIN)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@settings
def test_numbers_that_are_not_finite_are_as_in_pytorch_s_operations(value, settings):
    """In a whole row, in one column, in the target's, in all but the target's, and in no column."""
    z, target = operands(5, 4100)
    z[0] = z[1, 4099] = z[2, target[2]] = value
    z[3] = torch.where(torch.arange(4100, device=DEVICE) == target[3], z[3], value)
    by_torch = judge.row_loss_by(torch_backend)
    expected = judge.row_loss_of(by_torch, z, target, settings, None, True)
    found = judge.row_loss_of(row_loss, z, target, settings, None, True)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0][4].isfinite()


@pytest.mark.parametrize("wrong", [-100, -1, 45, 2**40])
def test_a_class_that_is_no_column_makes_its_row_nan(wrong):
    """It reads and writes no other memory.  On a GPU, the host doesn't wait to check classes."""
    z, target = operands(3, 45)
    target[1] = wrong
    losses, z = judge.row_loss_of(row_loss, z, target, PLAIN, None, True)
    assert z.isnan().all(1).tolist() == z.isnan().any(1).tolist() == [False, True, False]
    assert losses.isnan().tolist() == [False, True, False]


@dtypes
def test_the_op_runs_the_kernel_and_torch_s_products(dtype, monkeypatch):
    """In chunks of 8 rows, once forward and once backward.  Ignored rows are in no chunk."""
    monkeypatch.setattr("fastlora.backends.loss._rows_of_chunk", lambda *_: 8)
    weight, target = random(45, 12, dtype), torch.arange(27, device=DEVICE)
    leaves = [random(*shape, dtype).requires_grad_() for shape in ((27, 12), (3, 12), (45, 3))]
    target[::4] = -100

    def step(backend: str) -> list[Tensor]:
        torch.manual_seed(3)
        x, a, b = leaves
        loss = fastlora.linear_cross_entropy(
            x, weight, target, lora_a=a, lora_b=b, dropout=0.2, reduction="none", backend=backend
        )
        return [loss, *torch.autograd.grad(loss.sum(), leaves)]

    with counted_launches() as launches:
        found = step("triton")
    assert [counted.launch.name for counted in launches] == ["row_loss"] * 6
    for ours, its in zip(found, step("torch"), strict=True):
        assert (ours - its).abs().max() <= 8 * torch.finfo(dtype).eps * its.abs().max()


def test_a_target_and_an_upstream_gradient_with_other_strides():
    """The target is a column of a table, and every row has the same upstream number."""
    weight, table = random(45, 12), torch.randint(0, 45, (6, 3), device=DEVICE)
    x = random(6, 12).requires_grad_()
    a, b = random(3, 12).requires_grad_(), random(45, 3).requires_grad_()
    for reduction in ("none", "mean"):
        found = []
        for backend in ("triton", "torch"):
            settings = {"reduction": reduction, "backend": backend}
            loss = fastlora.linear_cross_entropy(
                x, weight, table[:, 0], lora_a=a, lora_b=b, **settings
            )
            found.append([loss, *torch.autograd.grad(loss.sum(), [x, a, b])])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_calls_that_the_kernel_does_not_cover_run_on_pytorch_s_operations():
    """float64, columns with a stride, and no row."""
    for z in (random(3, 45).double(), random(3, 45, layout="column-major"), random(3, 45)[:0]):
        call = z, torch.arange(len(z), device=DEVICE), ALL, None, True
        with counted_launches() as launches:
            found = judge.row_loss_of(judge.row_loss_by(triton), *call)
        assert not launches
        expected = judge.row_loss_of(judge.row_loss_by(torch_backend), *call)
        torch.testing.assert_close(found, expected)


def test_a_chunk_on_a_gpu_has_256_mib_to_1_gib_of_logits():
    for v, dtype in ((49152, BF16), (262144, BF16), (128256, F32)):
        x = torch.empty(2**20, 8, dtype=dtype, device="meta")
        assert 2**28 <= _rows_of_chunk(len(x), v, x) * v * dtype.itemsize <= 2**30
