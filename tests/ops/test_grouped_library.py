"""The registered op of experts, and torch.compile over it."""

import pytest
import torch
from experts import call, ends_of, make_experts, make_rows
from torch.nn.functional import silu

import fastlora
from fastlora.backends import Call, find_backend
from fastlora.ops.function import LoRALinearFunction
from fastlora.projection import Layout
from fastlora.rows import Rows

pytestmark = pytest.mark.usefixtures("backend")


def op_arguments(p: float, requires_grad: bool = True):
    experts = make_experts(4, 16, 8, 3, torch.float32, bias=True)
    weight, lora_a, lora_b, bias = (t.detach().requires_grad_(requires_grad) for t in experts)
    x = make_rows(13, 8, torch.float32).detach().requires_grad_(requires_grad)
    seeds = torch.randint(-9, 9, (1,)) if p else None
    tensors, ends = [weight, bias, lora_a, lora_b], ends_of([5, 0, 2, 4])
    return x, tensors, [True], [1], [0.5], "", p, seeds, "", ends


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck_forward(p):
    torch.library.opcheck(torch.ops.fastlora.lora_linears.default, op_arguments(p))


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(
    "needs", [[True] * 5, [True, False, False, True, False]], ids=["all", "some"]
)
def test_opcheck_backward(p, needs):
    x, tensors, *settings = op_arguments(p, requires_grad=False)
    ys, hs = torch.ops.fastlora.lora_linears(x, tensors, *settings)
    arguments = (ys, x, tensors, hs, needs, *settings)
    torch.library.opcheck(torch.ops.fastlora.lora_linears_backward.default, arguments)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_op_and_the_eager_node_agree(p):
    x, tensors, *rest, seeds, name, offsets = op_arguments(p)
    (y,), _ = torch.ops.fastlora.lora_linears(x, tensors, *rest, seeds, name, offsets)
    by_op = torch.autograd.grad(y.square().sum(), [x, *tensors])
    one = Call((Layout(True, (0.5,)),), p, find_backend(), Rows(offsets))
    (y,) = LoRALinearFunction.apply(seeds, offsets, one, x, *tensors)
    by_node = torch.autograd.grad(y.square().sum(), [x, *tensors])
    assert all(torch.equal(a, b) for a, b in zip(by_op, by_node, strict=True))


def two_layers(x, up, down, offsets, **options):
    return call(silu(call(x, up, offsets, **options)), down, offsets, **options)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_with_dynamic_rows(compiler):
    """One graph for all numbers of rows."""
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    dtype = torch.bfloat16
    up = make_experts(3, 16, 8, 3, dtype, torch.float32, bias=True)
    down = make_experts(3, 8, 16, 4, dtype, torch.float32)
    leaves = [t for experts in (up, down) for t in experts if t is not None and t.requires_grad]
    compiled = torch.compile(two_layers, fullgraph=True, backend=compiler, dynamic=True)
    for counts in ([4, 0, 6], [9, 5, 2], [0, 1, 20]):
        x = make_rows(sum(counts) + 1, 8, dtype)
        ys = [run(x, up, down, ends_of(counts)) for run in (compiled, two_layers)]
        torch.testing.assert_close(*ys)
        ours, theirs = (torch.autograd.grad(y.square().mean(), [x, *leaves]) for y in ys)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert graphs["unique_graphs"] == 1


def test_compile_with_dropout_uses_one_mask_for_both_directions():
    """d lora_a of experts with N = r = 1 and one row each is the dropped x."""
    torch.compiler.reset()
    weight, lora_a, lora_b = torch.zeros(2, 1, 32), torch.ones(2, 1, 32), torch.ones(2, 1, 1)
    x = torch.rand(2, 32) + 0.5

    def run(lora_a):
        return fastlora.lora_grouped(x, weight, lora_a, lora_b, ends_of([1, 1]), dropout=0.5)

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(lora_a.requires_grad_())
    y.sum().backward()
    kept = lora_a.grad.squeeze(1) / x
    torch.testing.assert_close(kept.round(decimals=3).unique(), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(lora_a.grad.sum(2), y.detach())


def test_an_unknown_backend_is_an_error_when_compiled():
    torch.compiler.reset()
    x, experts = make_rows(4, 8, torch.float32), make_experts(2, 8, 8, 2, torch.float32)
    compiled = torch.compile(lambda x: call(x, experts, ends_of([2, 2]), backend="metal"))
    with pytest.raises(ValueError, match="backend 'metal'"):
        compiled(x)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, tensor in make_experts(2, 8, 8, 2, torch.float32)._asdict().items():
            if tensor is not None:
                self.register_parameter(name, torch.nn.Parameter(tensor.detach()))

    def forward(self, x, offsets):
        return fastlora.lora_grouped(x, self.weight, self.lora_a, self.lora_b, offsets)


def test_export():
    layer, x, offsets = Layer(), torch.randn(4, 8), ends_of([1, 3])
    exported = torch.export.export(layer, (x, offsets))
    torch.testing.assert_close(exported.module()(x, offsets), layer(x, offsets))
    torch.testing.assert_close(exported.module()(x, ends_of([3, 1])), layer(x, ends_of([3, 1])))


def test_fake_and_meta_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    experts = make_experts(3, 16, 8, 3, torch.float32, bias=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = call(torch.randn(5, 8), experts, torch.empty(3, dtype=torch.int32), dropout=0.5)
        assert y.shape == (5, 16)
    experts = type(experts)(*[t.detach().to("meta").requires_grad_() for t in experts])
    x = torch.randn(5, 8, device="meta")
    y = call(x, experts, torch.empty(3, dtype=torch.int32, device="meta"), dropout=0.5)
    assert y.shape == (5, 16)
    y.sum().backward()
    assert experts.lora_b.grad.shape == (3, 16, 3)
