"""The Triton backend: the calls it covers, and its reasons against others.

The launches of whole layers are in tests/kernels/test_host.py.
"""

import warnings

import pytest
import torch
from judge import make_projection
from marks import DEVICE
from process import run_forked

import fastlora
from fastlora.backends.triton import supported
from fastlora.kernels.launch import intercept
from fastlora.kernels.plan import IN_PLACE, MANY_ROWS, use_plan

pytestmark = pytest.mark.usefixtures("on_triton")


@pytest.fixture
def on_triton(poisoned_memory, monkeypatch):
    monkeypatch.setattr(supported, "_said", set())
    with fastlora.use_backend("triton"), torch.device(DEVICE):
        yield


def launches(run) -> list[str]:
    """The names of the kernels that ``run`` would launch."""
    names = []
    with intercept(lambda launch: names.append(launch.name)):
        run()
    return names


def make_x(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("rows", "frozen", "expected"),
    [
        (100, "", ["weight_grad", "weight_grad"]),
        (MANY_ROWS, "", ["weight_grad", "lowrank", "weight_grad"]),
        (100, "lora_a", ["weight_grad", "lowrank"]),
        (100, "x", ["weight_grad", "weight_grad"]),
    ],
)
def test_in_place_few_rows_need_one_pass_over_x(rows, frozen, expected):
    """One launch computes the low-rank term of dx and d lora_a, if both are needed."""
    x, projection = make_x(rows, 32), make_projection(32, 32, 3, torch.float32)
    if frozen:
        (x if frozen == "x" else projection.lora_a).requires_grad_(False)
    with use_plan(IN_PLACE):
        y = fastlora.lora_linear(x, *projection[:3])
        names = launches(lambda: y.sum().backward())
    assert [name for name in names if name != "sum_planes"] == expected


@pytest.mark.parametrize("n", [1, 3], ids="group-of-{}".format)
def test_few_rows_run_in_one_launch_a_projection(n):
    x, group = make_x(3, 64), [make_projection(64, 64, 8, torch.float32) for _ in range(n)]
    assert launches(lambda: fastlora.lora_linears(x, group)) == ["gemm_lowrank_few_rows"] * n
    assert "project" in launches(lambda: fastlora.lora_linears(x, group, dropout=0.5))


@pytest.mark.parametrize("frozen", ["x", "lora_a", "lora_b"])
def test_only_the_gradients_asked_for_are_computed(frozen):
    x, projection = make_x(40, 64), make_projection(24, 64, 3, torch.float32)
    (x if frozen == "x" else getattr(projection, frozen)).requires_grad_(False)
    y = fastlora.lora_linear(x, *projection[:3])
    names = launches(lambda: y.sum().backward())
    assert names.count("gemm_lowrank") == (0 if frozen == "x" else 1)
    assert names.count("weight_grad") == (2 if frozen == "x" else 1)


def test_float64_runs_on_torch_and_says_so_once():
    layer = fastlora.LoRALinear(6, 4, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="torch backend: the Triton kernels don't have") as record:
        assert launches(lambda: layer(x)) == []
    assert record[0].filename == __file__  # the caller's line, not fastlora's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def test_an_adapter_in_float64_is_a_reason_too():
    projection = make_projection(4, 6, 2, torch.float32, torch.float64)
    with pytest.warns(UserWarning, match="don't have torch.float64"):
        fastlora.lora_linears(make_x(5, 6), [projection])


def test_no_rows_launch_nothing_and_say_nothing():
    layer = fastlora.LoRALinear(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launches(lambda: layer(torch.randn(0, 6)).sum().backward()) == []
    assert layer.lora_A.grad.abs().sum() == 0


def test_a_row_too_many_is_a_reason(monkeypatch):
    monkeypatch.setattr(supported, "LONGEST", 10)
    projection = make_projection(4, 6, 2, torch.float32)
    with pytest.warns(UserWarning, match="count to 10, but x has 11 rows"):
        fastlora.lora_linears(make_x(11, 6), [projection])


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the default is triton")
def test_a_cpu_without_the_interpreter_runs_on_torch():
    code = (
        "import sys; sys.stderr = sys.stdout; import fastlora, torch\n"
        "print(fastlora.LoRALinear(4, 3, r=2)(torch.randn(2, 4)).shape)"
    )
    assert "UserWarning" not in run_forked(code, TRITON_INTERPRET="0")
    output = run_forked(code, TRITON_INTERPRET="0", FASTLORA_BACKEND="triton")
    assert "torch.Size([2, 3])" in output
    assert "on a CPU the Triton kernels run only under TRITON_INTERPRET=1" in output


@pytest.mark.parametrize(
    ("switch", "precision"),
    [
        ("torch.set_float32_matmul_precision('highest')", "ieee"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    ],
)
def test_every_switch_of_float32_precision_is_followed(switch, precision):
    code = (
        f"import torch, fastlora; {switch}\n"
        "from fastlora.backends.triton.supported import precision_of\n"
        "from fastlora.kernels.target import TARGETS, use_target\n"
        "with use_target(TARGETS['sm_90']): print(precision_of(torch.ones(1, device='meta')))"
    )
    assert run_forked(code).split()[-1] == precision


def test_without_the_package_triton_the_backend_is_an_error():
    code = (
        "import sys; sys.modules['triton'] = None; import fastlora\n"
        "try:\n    fastlora.use_backend('triton').__enter__()\n"
        "except ValueError as error:\n    print(error)"
    )
    assert "the package triton isn't installed" in run_forked(code)
