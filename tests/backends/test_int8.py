"""8-bit products of the torch backend: every integer sum is the oracle's, and so are the calls."""

from itertools import product

import int8
import pytest
import torch
from int8 import exact, random_weight
from judge import make_projection

import fastlora
from fastlora.backends import int8 as backend
from fastlora.backends import products
from fastlora.formats.packing import pack_weight
from fastlora.formats.rotated_int8 import rotate
from fastlora.projection import Adapter, Base, Output

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def torch_backend_only():
    with fastlora.use_backend("torch"):
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in every loop: rows, columns, sums that are scaled at once, long sums."""
    monkeypatch.setattr(backend, "_MOST_ROWS", 24)
    monkeypatch.setattr(backend, "_SUMS", 24 * 40)
    monkeypatch.setattr(backend, "_AT_ONCE", 200)
    monkeypatch.setattr(backend, "LONGEST_SUM", 48)


def step(x, output: Output, dy, p: float = 0.0) -> tuple[torch.Tensor, ...]:
    """y and the gradients of x and of each adapter."""
    x = x.detach().requires_grad_()
    y = fastlora.lora_linears(x, [output], dropout=p)[0]
    leaves = [x, *[t for a in output.adapters for t in a[:2]]]
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of a rotation's sums, which depends on the number of rows."""
    eps = 4 * torch.finfo(expected.dtype).eps
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps * largest)


SHAPES = [*product([1, 2, 7, 16, 17, 33], [64, 100, 192], [1, 48, 65]), (70, 63, 9), (40, 1, 1)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_every_sum_is_exact(dtype):
    torch.manual_seed(0)
    for m, k, n in SHAPES:
        x, dy, weight = exact(m, k, dtype=dtype), exact(m, n, dtype=dtype), random_weight(n, k)
        bias = torch.randn(n)
        y, dx = step(x, Output(Base(weight, bias)), dy)
        assert torch.equal(y, int8.linear(x, weight, bias).to(dtype)), (m, k, n)
        assert_near(dx, rotate(int8.before_rotation(dy, weight).to(dtype)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_change_no_sum(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, dy, weight = exact(70, 130), exact(70, 90), random_weight(90, 130)
        y, dx = step(x, Output(Base(weight)), dy)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, int8.linear(x, weight), rtol=1e-6, atol=1e-6)
    assert_near(dx, rotate(int8.before_rotation(dy, weight)))


def test_the_largest_sums_don_t_overflow():
    """Contractions of 140,000 in both directions: a head's vocabulary, for example."""
    k = n = 140_000
    for rows, columns in ((3, k), (n, 3)):
        codes = torch.full((rows, columns), 127, dtype=torch.int8)
        weight = random_weight(rows, columns)
        weight = weight._replace(tensors=(codes, torch.ones(rows)))
        # K isn't rotated where a block holds one 1: the last columns, or less than 64.
        x = torch.zeros(17, columns)
        x[:, columns // 64 * 64 :] = 1.0
        x[:, : columns // 64 * 64 : 64] = 8.0
        y, dx = step(x, Output(Base(weight)), torch.ones(17, rows))
        whole = columns // 64 * 64 + columns % 64
        assert torch.allclose(y, torch.full_like(y, 127.0 * whole))
        columns_of_dx = dx if columns < 64 else dx[:, columns // 64 * 64 :]
        assert torch.allclose(columns_of_dx, torch.full_like(columns_of_dx, 127.0 * rows))


class OnAnotherDevice(torch.Tensor):
    """A tensor that says that it isn't on a CPU."""

    is_cpu = False


def test_a_product_on_other_devices_is_exact():
    left = torch.randint(-127, 128, (5, 3000), dtype=torch.int8)
    right = torch.randint(-127, 128, (3000, 7), dtype=torch.int8)
    other = left.as_subclass(OnAnotherDevice)
    found = backend.int_product(other, right, "sums", torch.empty(5, 7))
    assert torch.equal(found.long(), left.long() @ right.long())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_isn_t_finite_stays_alone(value):
    x, weight, dy = exact(20, 128), random_weight(48, 128), exact(20, 48)
    output = Output(Base(weight))
    expected = step(x, output, dy)
    x[3, 5], dy[7, 2] = value, value
    for found, truth, row in zip(step(x, output, dy), expected, (3, 7), strict=True):
        assert not found[row].isfinite().any()
        others = [i for i in range(20) if i != row]
        assert torch.equal(found[others], truth[others])


@pytest.fixture(params=[True, False], ids=["wide", "native"])
def wide(request, monkeypatch):
    """Both paths for 16-bit products on a CPU, independent of this CPU."""
    monkeypatch.setattr(products, "FORCED", request.param)


def relative(found, truth) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_call_is_near_that_of_the_dense_weight(dtype, p):
    torch.manual_seed(0)
    k, n = 192, 96
    one = make_projection(n, k, 4, dtype, F32, bias=True)
    bias = one.bias.detach().float()
    packed = pack_weight(one.weight, "int8")
    twice = (2 * one.lora_a).detach().requires_grad_()
    adapters = Adapter(one.lora_a, one.lora_b, 0.5), Adapter(twice, one.lora_b, 0.25)
    x, dy = torch.randn(3, 40, k).to(dtype), torch.randn(3, 40, n).to(dtype)
    found, expected = [], []
    for into, weight in ((found, packed), (expected, packed.dense(dtype))):
        torch.manual_seed(1)
        into += step(x, Output(Base(weight, bias), adapters), dy, p)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert relative(one, other) < 0.02
    for one, other in zip(found[2:], expected[2:], strict=True):  # x and dy aren't rounded for them
        assert relative(one, other) < (1e-6 if dtype == F32 else 1e-2)


def test_x_is_rounded_once_for_all_outputs(monkeypatch):
    rows, run = [], backend.quantize_rows

    def noted(x, *rest, **named):
        rows.append(x.shape[1])
        return run(x, *rest, **named)

    monkeypatch.setattr(backend, "quantize_rows", noted)
    x, sizes = torch.randn(40, 128, requires_grad=True), (64, 32, 96)
    outputs = [Output(Base(random_weight(n, 128))) for n in sizes]
    ys = fastlora.lora_linears(x, outputs)
    assert rows == [128]
    (dx,) = torch.autograd.grad(sum(y.sum() for y in ys), x)
    assert rows == [128, *sizes]
    apart = [step(x, output, torch.ones(40, n)) for output, n in zip(outputs, sizes, strict=True)]
    assert all(torch.equal(y, part[0]) for y, part in zip(ys, apart, strict=True))
    torch.testing.assert_close(dx, sum(part[1] for part in apart), rtol=1e-5, atol=1e-5)


def test_shapes_of_x():
    weight = random_weight(48, 128)
    run = lambda x: fastlora.lora_linears(x, [Output(Base(weight))])[0]  # noqa: E731
    x = exact(20, 128)
    y = run(x)
    assert torch.equal(run(x[3]), y[3])
    assert run(x[:0]).shape == (0, 48)
    assert torch.equal(run(x.view(2, 2, 5, 128)), y.view(2, 2, 5, 48))
    assert torch.equal(run(x.T.contiguous().T), y)
    assert torch.equal(run(x.repeat(1, 2)[:, :128]), y)
    assert torch.equal(run(x[::2]), y[::2])
    assert torch.equal(run(x[:1].expand(5, 128)), y[:1].expand(5, 48))


def test_float64_transforms_and_second_gradients_use_the_dense_weight():
    weight = random_weight(48, 128)
    dense = weight.dense(torch.float64)
    x = torch.randn(20, 128, dtype=torch.float64, requires_grad=True)
    output = Output(Base(weight))
    y = fastlora.lora_linears(x, [output])[0]
    torch.testing.assert_close(y, x @ dense.T)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, dense.sum(0).expand(20, 128))
    small = x.detach().float()
    mapped = torch.func.vmap(lambda row: fastlora.lora_linears(row, [output])[0])(small)
    torch.testing.assert_close(mapped, small @ dense.float().T, rtol=1e-4, atol=1e-4)
    jacobian = torch.func.jacrev(lambda row: fastlora.lora_linears(row, [output])[0])(small[0])
    torch.testing.assert_close(jacobian, dense.float(), rtol=1e-4, atol=1e-4)


def test_compiled_and_under_autocast():
    weight, x = random_weight(64, 128), exact(20, 128)

    def run(x):
        return fastlora.lora_linears(x, [Output(Base(weight))])[0]

    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, backend="aot_eager")(x), run(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x)
    assert y.dtype == BF16
    assert torch.equal(y, run(x.bfloat16()))


def test_many_adapters_share_a_base_in_8_bits():
    weight, x = pack_weight(torch.randn(48, 128), "int8"), torch.randn(6, 128)
    lora_a, lora_b = torch.randn(2, 4, 128), torch.randn(2, 48, 4)
    indices = torch.tensor([0, 1, -1, 1, 0, 0])
    how = {"scales": [0.5, 0.25]}
    found = fastlora.multi_lora_linear(x, weight, lora_a, lora_b, indices, **how)
    dense = weight.dense(F32)
    expected = fastlora.multi_lora_linear(x, dense, lora_a, lora_b, indices, **how)
    assert relative(found, expected) < 0.02


def test_experts_in_8_bits():
    stack = torch.randn(3, 48, 128)
    weight, x = pack_weight(stack, "int8"), torch.randn(20, 128, requires_grad=True)
    lora_a, lora_b = torch.randn(3, 4, 128), torch.randn(3, 48, 4)
    ends = torch.tensor([7, 7, 20], dtype=torch.int32)
    ys = [
        fastlora.grouped_lora_linear(x, each, lora_a, lora_b, ends)
        for each in (weight, weight.dense(F32))
    ]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in ys]
    assert relative(*ys) < 0.02
    assert relative(*gradients) < 0.03


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_loss_of_a_head_in_8_bits(p):
    torch.manual_seed(0)
    weight, x = pack_weight(torch.randn(300, 128) / 10, "int8"), torch.randn(50, 128)
    lora_a, lora_b = torch.randn(4, 128), torch.randn(300, 4) / 10
    target = torch.randint(0, 300, (50,))
    found = []
    for each in (weight, weight.dense(F32)):
        torch.manual_seed(1)
        leaves = [t.clone().requires_grad_() for t in (x, lora_a, lora_b)]
        loss = fastlora.linear_cross_entropy(
            leaves[0], each, target, lora_a=leaves[1], lora_b=leaves[2], dropout=p
        )
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(relative(one, other) < 0.03 for one, other in zip(*found, strict=True))


def test_dora_over_a_base_in_8_bits():
    from fastlora.ops.dora import dora_linear, dora_norm

    weight, x = pack_weight(torch.randn(48, 128), "int8"), torch.randn(20, 128)
    lora_a, lora_b = torch.randn(4, 128) / 10, torch.randn(48, 4) / 10
    magnitude = torch.rand(48) + 1
    ys = [
        dora_linear(x, each, lora_a, lora_b, magnitude, bias=None, scale=0.5,
                    drop=None, norm=dora_norm(each, lora_a, lora_b, 0.5))
        for each in (weight, weight.dense(F32))
    ]  # fmt: skip
    assert relative(*ys) < 0.02
