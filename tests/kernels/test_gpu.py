"""Tests that need a GPU: streams, graphs, several devices, and tensors beyond 2³¹ elements."""

import pytest
import torch
from judge import make_projection
from torch import nn

import fastlora
from fastlora.backends import backend_name
from fastlora.kernels.plan import FUSED, IN_PLACE, use_plan, use_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        yield


@pytest.fixture(params=[FUSED, IN_PLACE], ids=["fused", "in-place"])
def plan(request):
    with use_plan(request.param):
        yield


def make_layer(dropout: float = 0.0) -> fastlora.LoRALinear:
    layer = fastlora.LoRALinear(256, 192, r=16, lora_dropout=dropout, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    return layer


def make_x(rows: int = 300) -> torch.Tensor:
    return torch.randn(rows, 256, dtype=torch.bfloat16, requires_grad=True)


def step(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))]


def test_tuning_changes_later_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    layer, x = make_layer(0.1), make_x()
    step(layer, x)
    try:
        found = fastlora.tune(layer, len(x), seconds=10.0, progress=False)
        assert [line.product.split()[0] for line in found.lines] == ["y", "dx"]
        assert all(0 < line.seconds <= line.default_seconds for line in found.lines)
        assert found.path
        step(layer, x)
    finally:
        use_rows(())


def experts_step() -> list[torch.Tensor]:
    """Six experts, one of them without rows, and rows that belong to no expert."""
    shapes = (4000, 1024), (6, 16, 1024), (6, 1536, 16)
    generator = torch.Generator("cuda").manual_seed(3)
    x, lora_a, lora_b = leaves = [
        torch.randn(shape, generator=generator, dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    ]
    weight = torch.randn(6, 1536, 1024, generator=generator, dtype=torch.bfloat16)
    ends = torch.tensor([700, 700, 1501, 1502, 2900, 3999], dtype=torch.int32)
    y = fastlora.grouped_lora_linear(x, weight, lora_a, lora_b, ends, dropout=0.1)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def loss_step() -> list[torch.Tensor]:
    """A head with an adapter, and ignored rows."""
    weight, a, b, *_ = make_projection(50257, 512, 16, torch.bfloat16)
    x = torch.randn(2100, 512, dtype=torch.bfloat16, requires_grad=True)
    target = torch.arange(2100) * 23
    target[::4] = -100
    loss = fastlora.linear_cross_entropy(x, weight, target, lora_a=a, lora_b=b, dropout=0.1)
    return [loss, *torch.autograd.grad(loss, (x, a, b))]


def layer_step(dropout: float) -> list[torch.Tensor]:
    layer = fastlora.LoRALinear(1024, 1536, r=16, lora_dropout=dropout, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    return step(layer, torch.randn(4096, 1024, dtype=torch.bfloat16, requires_grad=True))


REPEATED = {
    "layer": lambda: layer_step(0.0),
    "layer-dropout": lambda: layer_step(0.1),
    "experts": experts_step,
    "loss": loss_step,
}


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("run", REPEATED.values(), ids=REPEATED)
def test_a_thousand_repeats_beside_a_busy_stream_have_the_same_bits(run):
    def once() -> list[torch.Tensor]:
        torch.manual_seed(7)
        return run()

    expected, stream = once(), torch.cuda.Stream()
    matrix, unlike = torch.randn(4096, 4096, dtype=torch.bfloat16), torch.zeros(len(expected))
    for _ in range(1000):
        with torch.cuda.stream(stream):
            matrix @ matrix  # takes processors and memory bandwidth from the kernels
        found = once()
        unlike += torch.stack([(a != b).sum() for a, b in zip(found, expected, strict=True)])
    assert unlike.tolist() == [0.0] * len(expected)


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("run", REPEATED.values(), ids=REPEATED)
def test_a_step_for_the_sanitizer(run):
    """benchmarks/visit.py runs it under compute-sanitizer; here it only requires finite numbers."""
    assert all(tensor.isfinite().all() for tensor in run())


def test_triton_is_the_default():
    assert backend_name(device=torch.device("cuda", 0)) == "triton"


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_waits_for_the_device(dropout):
    layer, x = make_layer(dropout), make_x()
    step(layer, x)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("plan")
def test_a_graph_replays_both_directions():
    layer, x = make_layer(), make_x()
    eager = step(layer, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x)
    for tensor in captured:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


@pytest.mark.usefixtures("plan")
def test_every_replay_draws_its_own_mask_for_both_directions():
    """With N = r = 1 and ones, y counts the kept inputs, and d lora_a shows which ones they are."""
    layer = fastlora.LoRALinear(256, 1, bias=False, r=1, lora_alpha=1, lora_dropout=0.5)
    for parameter, value in ((layer.weight, 0.0), (layer.lora_A, 1.0), (layer.lora_B, 1.0)):
        nn.init.constant_(parameter, value)
    x = torch.ones(1, 256)

    def call():
        y = layer(x)
        return y, torch.autograd.grad(y.sum(), layer.lora_A)[0]

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, d_lora_a = call()
    kept = []
    for _ in range(3):
        graph.replay()
        assert d_lora_a.sum().item() == y.item()
        kept.append(d_lora_a.clone())
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


@pytest.mark.usefixtures("plan")
def test_launches_go_to_the_current_stream():
    layer, x = make_layer(), make_x()
    expected, stream = step(layer, x), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late.copy_(x.detach())  # a kernel on another stream would read zeros
        found = step(layer, late.requires_grad_())
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    layer, x = make_layer(), make_x()
    expected = step(layer, x)
    found = step(layer.to("cuda:1"), x.detach().to("cuda:1").requires_grad_())
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.usefixtures("plan")
def test_more_than_2_31_elements():
    rows = 2**31 // 4096 + 300
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 2**32:
        pytest.skip("x, y, dy and dx of 4 GiB each don't fit")
    x = torch.randn(rows, 4096, dtype=torch.bfloat16, requires_grad=True)
    projection = make_projection(4096, 4096, 16, torch.bfloat16)
    y = fastlora.lora_linear(x, *projection[:3], scale=0.5)
    last = x.detach()[-200:].clone().requires_grad_()
    y_last = fastlora.lora_linear(last, *projection[:3], scale=0.5, backend="torch")
    # Two results, each rounded once, may differ by one unit, 2⁻⁷ of their value.  Rounding h adds
    # up to 0.2 % of the largest value.  The error of tensor cores is far smaller (docs/maths.md).
    torch.testing.assert_close(y[-200:], y_last, rtol=1e-2, atol=2.0)
    dy = torch.zeros_like(y)
    dy[-200:] = torch.randn(200, 4096, dtype=torch.bfloat16)
    y.backward(dy)
    found = [projection.lora_a.grad, projection.lora_b.grad]
    projection.lora_a.grad = projection.lora_b.grad = None
    y_last.backward(dy[-200:])
    torch.testing.assert_close(x.grad[-200:], last.grad, rtol=1e-2, atol=2.0)
    for ours, theirs in zip(found, [projection.lora_a.grad, projection.lora_b.grad], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=theirs.abs().max().item() / 200)
