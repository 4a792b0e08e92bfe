"""row_loss: each row's cross-entropy, and its gradient in place of the logits, against float64."""

import judge
import pytest
import torch
from kernel_cases import (
    BF16,
    DEVICE,
    DTYPE_IDS,
    F16,
    F32,
    counted_launches,
    launched,
    poisoned,
    random,
)  # fmt: skip
from torch import Tensor
from torch.nn import functional

import fastlora
from fastlora.backends import find_backend
from fastlora.backends.loss import _rows_of_chunk
from fastlora.backends.protocol import LossSettings
from fastlora.kernels import row_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")

dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=DTYPE_IDS.get)
PLAIN = LossSettings()
SETTINGS = {
    "plain": PLAIN,
    "smoothing": LossSettings(label_smoothing=0.1),
    "only-smoothing": LossSettings(label_smoothing=1.0),
    "softcap": LossSettings(softcap=3.0),
    "wide-softcap": LossSettings(softcap=1000.0),
    "scale": LossSettings(logit_scale=-0.5),
    "z-loss": LossSettings(z_loss=0.01),
    "all": LossSettings(0.1, 3.0, 2.0, 0.01),
}


def operands(m: int, v: int, dtype=F32, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    return random(m, v, dtype, layout).mul_(3.0), torch.randint(0, v, (m,), device=DEVICE)


@dtypes
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_any_settings(settings, dtype):
    for upstream in (None, random(1, 3)[0]):
        judge.check_row_loss(row_loss, *operands(3, 1027, dtype), settings, upstream)


@pytest.mark.parametrize("v", [1, 2, 5, 1000, 1027, 4096, 4097, 9001])
@pytest.mark.parametrize("m", [1, 3])
def test_any_shape(m, v):
    judge.check_row_loss(row_loss, *operands(m, v, BF16), SETTINGS["all"])


@pytest.mark.parametrize("layout", ["window", "odd", "every-second-row"])
def test_rows_of_any_stride(layout):
    z, target = operands(4, 45, BF16, layout)
    around = z._base.isnan().sum()
    judge.check_row_loss(row_loss, z, target, PLAIN)
    assert z._base.isnan().sum() == around  # nothing beside the rows is written


def test_the_first_and_the_last_class():
    z, _ = operands(2, 4099)
    judge.check_row_loss(row_loss, z, torch.tensor([0, 4098], device=DEVICE), SETTINGS["all"])


@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_a_number_added_to_every_logit_changes_no_result(shift):
    z, target = operands(3, 5000)
    judge.check_row_loss(row_loss, z.add_(shift), target, PLAIN)


ODD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_numbers_that_are_not_finite_are_as_in_pytorch_s_operations(value, settings):
    """In a whole row, in one column, in the target's, in all but the target's, and in no column."""
    z, target = operands(5, 4100)
    z[0], z[1, 4099] = value, value
    z[2, target[2]] = value
    z[3] = torch.where(torch.arange(4100, device=DEVICE) == target[3], z[3], value)
    found, expected, of_rows = z.clone(), z.clone(), poisoned(2, 5)
    row_loss(found, target, of_rows[0], settings, None, True)
    find_backend("torch").row_loss(expected, target, of_rows[1], settings, None, True)
    torch.testing.assert_close(*of_rows, equal_nan=True)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert of_rows[0, 4].isfinite()


@pytest.mark.parametrize("wrong", [-100, -1, 45, 2**40])
def test_a_class_that_is_no_column_makes_its_row_nan(wrong):
    """It reads and writes no other memory.  On a GPU, reading the classes would make it wait."""
    z, target = operands(3, 45)
    expected, of_rows = z.clone(), poisoned(2, 3)
    row_loss(expected, target, of_rows[0], PLAIN, None, True)
    target[1] = wrong
    row_loss(z, target, of_rows[1], PLAIN, None, True)
    expected[1] = of_rows[0, 1] = torch.nan
    torch.testing.assert_close(z, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(*of_rows, rtol=0, atol=0, equal_nan=True)


@dtypes
@pytest.mark.parametrize("gradient", [False, True])
def test_bytes_are_as_stated(gradient, dtype):
    """Without the caches, a row is loaded twice, and stored once."""
    z, target = operands(3, 5000, dtype)
    upstream = random(1, 3)[0]
    with counted_launches() as launches:
        row_loss(z, target, poisoned(3), SETTINGS["all"], upstream, gradient)
    [counted] = launches
    assert counted.stated.loaded == len(counted.loads.addresses())
    assert counted.stated.loaded_by_tiles == counted.loads.total
    assert counted.loads.total <= (1 + gradient) * z.nbytes + 3 * (dtype.itemsize + 8 + 4)
    assert counted.stated.stored == counted.stores.total == gradient * z.nbytes + 3 * 4


def head(dtype=F32, v: int = 45) -> dict[str, Tensor]:
    shapes = {"x": (27, 12), "weight": (v, 12), "lora_a": (3, 12), "lora_b": (v, 3)}
    return {n: random(*s, dtype).requires_grad_(n != "weight") for n, s in shapes.items()}


def loss_and_gradients(given: dict, backend: str, **settings) -> list[Tensor]:
    target = torch.arange(27, device=DEVICE).remainder(45)
    target[::4] = -100
    torch.manual_seed(3)
    loss = fastlora.linear_cross_entropy(
        target=target, scale=0.5, dropout=0.2, backend=backend, **given, **settings
    )
    leaves = [each for each in given.values() if each.requires_grad]
    return [loss, *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@dtypes
def test_the_op_runs_the_kernel_and_torch_s_products(dtype, reduction, monkeypatch):
    """In chunks of 8 rows; ignored rows are in no chunk."""
    monkeypatch.setattr("fastlora.backends.loss._CHUNK_ON_CPU", 8 * 45 * dtype.itemsize)
    monkeypatch.setattr("fastlora.backends.loss._CHUNK", 8 * 45 * dtype.itemsize)
    monkeypatch.setattr("fastlora.backends.loss._FEWEST_ROWS", 1)
    given, settings = head(dtype), {"reduction": reduction, "label_smoothing": 0.1}
    expected = loss_and_gradients(given, "torch", **settings)
    found = loss_and_gradients(given, "triton", **settings)
    eps = torch.finfo(dtype).eps
    for ours, its in zip(found, expected, strict=True):
        assert (ours - its).abs().max() <= 8 * eps * its.abs().max()
    records = launched(lambda: loss_and_gradients(given, "triton", **settings))
    assert [each.name for each in records] == ["row_loss"] * (3 if reduction == "mean" else 6)


def test_what_the_kernel_does_not_cover_runs_on_torch_s_operations():
    """float64, columns with a stride, and no row."""
    for z in (random(3, 45).double(), random(3, 45, layout="column-major"), random(3, 45)[:0]):
        target, losses = torch.arange(len(z), device=DEVICE), poisoned(len(z), dtype=z.dtype)
        leaf, place = z.clone().requires_grad_(), z[:]
        expected = functional.cross_entropy(leaf, target, reduction="none")
        run = find_backend("triton").row_loss
        assert not launched(lambda: run(z.clone(), target, losses.clone(), PLAIN, None, True))  # noqa: B023
        run(place, target, losses, PLAIN, None, True)
        torch.testing.assert_close(losses, expected.detach())
        torch.testing.assert_close(place, torch.autograd.grad(expected.sum(), leaf)[0])


def test_a_chunk_on_a_gpu_has_256_mib_to_1_gib_of_logits():
    for v, dtype in ((49152, BF16), (262144, BF16), (128256, F32)):
        x = torch.empty(2**20, 8, dtype=dtype, device="meta")
        assert 2**28 <= _rows_of_chunk(len(x), v, x) * v * dtype.itemsize <= 2**30
