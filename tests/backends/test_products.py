"""16-bit products computed in float32, forced on any CPU; and the decision when to do so."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from judge import make_outputs, make_projection, make_x, peak_bytes, run_torch_backend
from process import run_forked, run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import reference
from fastlora.backends import formula, products
from fastlora.call.projection import as_outputs, flatten, layouts_of

DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32": (torch.bfloat16, torch.float32),
    "f16": (torch.float16, torch.float16),
    "f16-f32": (torch.float16, torch.float32),
}
dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES.values(), ids=DTYPES)
half_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
dropouts = pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)


@pytest.fixture(autouse=True)
def torch_backend_only():
    with fastlora.use_backend("torch"):
        yield


@pytest.fixture
def small_blocks(monkeypatch, wide):
    """Also with blocks of 8 rows of x and 4 rows of the weight."""
    for name in ("_BLOCK", "_ROWS"):
        monkeypatch.setattr(products, name, 0)
    monkeypatch.setattr(products, "_FEWEST_ROWS", 8)
    monkeypatch.setattr(products, "_FEWEST_OF_WEIGHT", 4)


@pytest.mark.usefixtures("small_blocks")
def test_a_bias_that_trains_is_summed_in_float32():
    """Summed over many blocks, with one rounding at the end."""
    x = make_x(4096, 10, dtype=torch.bfloat16)
    projection = make_projection(9, 10, 3, torch.bfloat16, torch.float32, bias=True)
    bias = projection.bias.detach().requires_grad_()
    y = fastlora.lora_linear(x, *projection[:3], bias=bias)
    dy = torch.rand_like(y) + 1.0
    (found,) = torch.autograd.grad(y, bias, dy)
    assert torch.equal(found, dy.float().sum(0).bfloat16())


def errors(x, projection):
    """The errors of y and of every gradient, relative to the largest value."""
    given = [x, *projection[:3]]
    y = fastlora.lora_linear(*given, scale=projection.scale)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    true_y = reference.lora_linear(*exact, scale=projection.scale)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    leaves = [[tensor for tensor in some if tensor.requires_grad] for some in (given, exact)]
    found = [y, *torch.autograd.grad(y, leaves[0], dy)]
    truth = [true_y, *torch.autograd.grad(true_y, leaves[1], dy.double())]
    pairs = zip(found, truth, strict=True)
    return [((found - true).abs().max() / true.abs().max()).item() for found, true in pairs]


@half_dtypes
def test_closer_to_the_truth_than_torch_s_own_product(monkeypatch, dtype):
    """y and dx are rounded once; the gradients of float32 adapters have float32's precision."""
    x, projection = make_x(96, 64, dtype=dtype), make_projection(48, 64, 8, dtype, torch.float32)
    found = {}
    for forced in (False, True):
        torch.manual_seed(1)
        monkeypatch.setattr(products, "FORCED", forced)
        found[forced] = errors(x, projection)
    assert all(ours < theirs for ours, theirs in zip(found[True], found[False], strict=True))
    once = 0.51 * torch.finfo(dtype).eps
    assert all(
        error <= most for error, most in zip(found[True], (once, once, 1e-6, 1e-6), strict=True)
    )


@half_dtypes
def test_one_row_s_forward_is_for_torch(monkeypatch, dtype):
    x, projection = make_x(1, 12, dtype=dtype), make_projection(9, 12, 3, dtype, torch.float32)
    ys = []
    for forced in (False, True):
        monkeypatch.setattr(products, "FORCED", forced)
        ys += fastlora.lora_linears(x, [projection])
    assert torch.equal(*ys)


def test_memory_is_bounded_by_the_blocks(monkeypatch, small_blocks):
    """More than torch's products need: h's other half, and a size independent of the row count."""
    x = make_x(1024, 64, dtype=torch.bfloat16)
    outputs = as_outputs([make_projection(48, 64, 2, torch.bfloat16, torch.float32)])
    for each in (products, formula):
        each.SCRATCH.matrices.clear()
    given, peaks = [x, *flatten(outputs, layouts_of(outputs))], {}
    for forced in (False, True):
        monkeypatch.setattr(products, "FORCED", forced)
        before, peak, _ = peak_bytes(given, lambda: run_torch_backend(x, outputs, 0.0, frozen=True))
        peaks[forced] = peak - before
    h, blocks = 1024 * 2 * 2, 2**14
    assert peaks[True] <= peaks[False] + h + blocks


class Narrow(TorchDispatchMode):
    """Records every matrix product in 16 bits."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "linear", "matmul", "bmm", "mv"):
            dtypes = {tensor.dtype for tensor in args if isinstance(tensor, torch.Tensor)}
            if dtypes & {torch.bfloat16, torch.float16}:
                self.found.append((name, dtypes))
        return func(*args, **(kwargs or {}))


@dtypes
@dropouts
@pytest.mark.parametrize("forced", [False, True])
def test_no_product_is_left_in_16_bits(monkeypatch, dtype, adapter_dtype, p, forced):
    """All gradients are computed, also the weights'."""
    monkeypatch.setattr(products, "FORCED", forced)
    x, outputs = make_x(17, 16, dtype=dtype), make_outputs(dtype, adapter_dtype)
    with Narrow() as narrow:
        run_torch_backend(x, outputs, p)
    assert bool(narrow.found) is not forced


@pytest.mark.usefixtures("small_blocks")
def test_two_threads_at_once():
    """Each thread has its own scratch memory."""
    projection = make_projection(41, 64, 3, torch.bfloat16, torch.float32)
    inputs = [make_x(40, 64, dtype=torch.bfloat16) for _ in range(2)]

    def run(x):
        (y,) = fastlora.lora_linears(x, [projection])
        return y, *torch.autograd.grad(y.square().sum(), (x, *projection[1:3]))

    alone, start = [run(x) for x in inputs], threading.Barrier(2)

    def often(x):
        start.wait()
        with fastlora.use_backend("torch"):
            return [run(x) for _ in range(20)]

    with ThreadPoolExecutor(2) as threads:
        found = [*threads.map(often, inputs)]
    for expected, runs in zip(alone, found, strict=True):
        assert all(torch.equal(*both) for got in runs for both in zip(expected, got, strict=True))


@pytest.mark.usefixtures("wide")
def test_training_after_inference_mode(monkeypatch):
    """A tensor made in inference mode can't be written to outside of it."""
    for each in (products, formula):
        monkeypatch.setattr(each, "SCRATCH", products.Scratch())
    x, projection = make_x(5, 12, dtype=torch.bfloat16), make_projection(9, 12, 3, torch.bfloat16)
    with torch.inference_mode():
        (first,) = fastlora.lora_linears(x, [projection])
    (y,) = fastlora.lora_linears(x, [projection])
    y.sum().backward()
    assert torch.equal(first, y)


@pytest.fixture
def undecided(monkeypatch):
    """No setting is forced, and torch reports no 16-bit products."""
    monkeypatch.setattr(products, "FORCED", None)
    monkeypatch.setattr(products, "_torch_has", lambda dtype: False)


@pytest.mark.usefixtures("undecided")
def test_torch_s_flags_decide(monkeypatch):
    rows = {d: torch.ones(2, 3, dtype=d) for d in (torch.bfloat16, torch.float16, torch.float32)}
    assert [products.are_wide(x) for x in rows.values()] == [True, True, False]
    half = rows[torch.bfloat16]
    assert not products.are_wide(half[:0])
    assert not products.are_wide(half.to("meta"))
    assert products.h_dtype(half.dtype, torch.device("meta")) == half.dtype
    monkeypatch.setattr(products, "_torch_has", lambda dtype: dtype == torch.bfloat16)
    assert [products.are_wide(x) for x in rows.values()] == [False, True, False]
    assert products.h_dtype(half.dtype, torch.device("cpu")) == half.dtype


@pytest.mark.usefixtures("undecided")
def test_fake_tensors_have_the_real_h():
    settings = ([False], [1], [1.0], "", 0.0, None, "torch")
    shapes = ((5, 8), (6, 8), (2, 8), (6, 2))
    with FakeTensorMode():
        x, *tensors = (torch.ones(shape, dtype=torch.bfloat16) for shape in shapes)
        _, fake = torch.ops.fastlora.lora_linears(x, tensors, *settings)
    x, *tensors = (torch.ones(shape, dtype=torch.bfloat16) for shape in shapes)
    _, real = torch.ops.fastlora.lora_linears(x, tensors, *settings)
    assert [h.dtype for h in fake] == [h.dtype for h in real] == [torch.float32]


@pytest.mark.usefixtures("undecided")
def test_compiled_calls_run_wide_too():
    x, projection = make_x(5, 12, dtype=torch.bfloat16), make_projection(9, 12, 3, torch.bfloat16)

    def call(x):
        return fastlora.lora_linear(x, *projection[:3])

    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x))


STATE = (
    "import torch, fastlora; from fastlora.backends import products as p;"
    "print(p._torch_has.cache_info().currsize, *(p.are_wide(torch.ones(2, 2, dtype=d))"
    " for d in (torch.bfloat16, torch.float16, torch.float32)))"
)


def test_the_import_decides_nothing_and_the_environment_everything():
    for value, answer in (("1", "True"), ("0", "False")):
        printed = run_forked(STATE, FASTLORA_WIDE_PRODUCTS=value)
        assert printed == f"0 {answer} {answer} False"


ON_X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("without", [True, False] if ON_X86 else [False], ids="without-{}".format)
def test_without_the_environment_torch_s_flags_decide(without):
    """For this CPU, and for one without 16-bit products: oneDNN and torch are limited to AVX2."""
    kept = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"} if without else {}
    flags = torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.ops.mkldnn._is_mkldnn_fp16_supported
    wide = [str(without or not flag()) for flag in flags]
    printed = run_python("-c", STATE, FASTLORA_WIDE_PRODUCTS=None, **kept)
    assert printed == f"0 {' '.join(wide)} False"


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("which", ["x", "dy"])
def test_rows_with_strided_elements(node, which, M):
    """torch 2.10 multiplies a single such row of bfloat16 wrongly."""
    (n, k), dtype = (64, 138), torch.bfloat16
    projection = make_projection(n, k, 8, dtype)
    x, dy = torch.randn(M, k).to(dtype), torch.randn(M, n).to(dtype)
    apart = lambda rows: torch.randn(rows.shape[1], 30).to(dtype).T[:M].copy_(rows)  # noqa: E731
    found = []
    for change in (apart, torch.clone):
        given = [change(t) if name == which else t for name, t in (("x", x), ("dy", dy))]
        inputs = given[0].requires_grad_(), *projection[1:3]
        y = fastlora.lora_linears(given[0], [projection])[0]
        gradients = torch.autograd.grad(y, inputs, given[1])
        found.append([y, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
