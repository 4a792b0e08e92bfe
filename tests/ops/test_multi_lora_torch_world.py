"""What surrounds a call with many adapters: the registered op, torch.compile, autocast, …"""

import pytest
import torch
from multi import call, gradients, make_adapters
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import AdapterMapping, reference
from fastlora.backends import Call, find_backend
from fastlora.ops.function import LoRALinearFunction
from fastlora.projection import Layout
from fastlora.rows import Own, rows_on

RANKS = [2, 5, 3]
INDICES = torch.tensor([2, 0, -1, 0, 2, -1], dtype=torch.int32)


def make(dtype=torch.float32, adapter_dtype=None, banks=True):
    x = torch.randn(6, 2, 8, dtype=torch.float64).to(dtype).requires_grad_()
    return x, make_adapters(RANKS, 6, 8, dtype, adapter_dtype, banks=banks)


def op_arguments(p: float, requires_grad: bool = True):
    x, adapters = make(banks=False)
    mapping = AdapterMapping(INDICES, 3)
    pairs = zip(adapters.lora_a, adapters.lora_b, strict=True)
    tensors = [adapters.weight, adapters.bias, *[tensor for pair in pairs for tensor in pair]]
    tensors = [tensor.detach().requires_grad_(requires_grad) for tensor in tensors]
    seeds = torch.randint(-9, 9, (3,)) if p else None
    numbers = torch.tensor(adapters.scales, dtype=torch.float64), torch.tensor([2, 4, 3])
    layout = [True], [3], [1.0] * 3, "", 0.0
    settings = *layout, seeds, "", mapping.ends, mapping.order, *numbers, [p, 0.0, p]
    return x.detach().requires_grad_(requires_grad), tensors, *settings


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck_forward(p):
    torch.library.opcheck(torch.ops.fastlora.lora_linears.default, op_arguments(p))


@pytest.mark.parametrize(
    "needs", [[True] * 9, [True, False, False, True, False] + [False] * 4], ids=["all", "some"]
)
def test_opcheck_backward(needs):
    x, tensors, *settings = op_arguments(0.2, requires_grad=False)
    ys, hs = torch.ops.fastlora.lora_linears(x, tensors, *settings)
    arguments = (ys, x, tensors, hs, needs, *settings)
    torch.library.opcheck(torch.ops.fastlora.lora_linears_backward.default, arguments)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_op_and_the_eager_node_agree(p):
    x, tensors, *arguments = op_arguments(p)
    *_, seeds, _, ends, order, scales, ranks, dropouts = arguments
    (y,), _ = torch.ops.fastlora.lora_linears(x, tensors, *arguments)
    by_op = torch.autograd.grad(y.square().sum(), [x, *tensors])
    own = Own(tuple(scales.tolist()), tuple(ranks.tolist()), tuple(dropouts))
    rows = rows_on(order, ends, x.device)._replace(own=own)
    one = Call((Layout(True, (1.0,) * 3),), 0.0, find_backend(), rows)
    (y,) = LoRALinearFunction.apply(seeds, None, one, x, *tensors)
    by_node = torch.autograd.grad(
        y.square().sum(), [x, *tensors], allow_unused=True, materialize_grads=True
    )
    assert all(map(torch.equal, by_op, by_node))


def test_compile_recompiles_for_no_scale_rank_or_index():
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    x, adapters = make(torch.bfloat16, torch.float32)

    def two_layers(x, indices, scales, ranks):
        options = {"scales": scales, "ranks": ranks}
        y = call(x, adapters, indices, **options)
        return call(torch.nn.functional.pad(y, (0, 2)), adapters, indices, **options)

    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager")
    leaves = [x, adapters.bias, adapters.lora_a, adapters.lora_b]
    for seed in range(3):
        torch.manual_seed(seed)
        indices = torch.randint(-1, 3, (6,)).to(torch.int32)
        arguments = (x, indices, torch.rand(3), torch.tensor([2, 3 + seed % 2, 1 + seed]))
        ys = [run(*arguments) for run in (compiled, two_layers)]
        torch.testing.assert_close(*ys)
        ours, theirs = (torch.autograd.grad(y.float().square().mean(), leaves) for y in ys)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert graphs["unique_graphs"] == 1


def test_compile_takes_a_mapping_and_lists_with_dropout():
    """d lora_a of adapters with N = r = 1 and one row each is the dropped x."""
    torch.compiler.reset()
    weight, lora_b = torch.zeros(1, 32), [torch.ones(1, 1)] * 2
    lora_a = [torch.ones(1, 32, requires_grad=True) for _ in range(2)]
    x, mapping = torch.rand(2, 32) + 0.5, AdapterMapping([1, 0], 2)

    def run(*lora_a):
        options = {"scales": [1.0, 1.0], "dropout": 0.5}
        return fastlora.multi_lora_linear(x, weight, list(lora_a), lora_b, mapping, **options)

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(*lora_a)
    y.sum().backward()
    kept = torch.cat([lora_a[1].grad, lora_a[0].grad]) / x
    torch.testing.assert_close(kept.round(decimals=3).unique(), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close((kept * x).sum(1, keepdim=True), y.detach())


def test_compiled_numbers_beyond_the_adapters_are_an_error():
    torch.compiler.reset()
    x, adapters = make()
    run = torch.compile(lambda indices: call(x, adapters, indices), backend="aot_eager")
    with pytest.raises(ValueError, match="beyond the adapters"):
        run(torch.tensor([0, 1, 2, 3, 0, 0]))


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, adapters = make()
        y = call(x, adapters, torch.zeros(6, dtype=torch.int32), dropout=0.5)
        assert y.shape == (6, 2, 6)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_autocast_casts_x_and_the_weight(p):
    x, adapters = make()
    ys = []
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys.append(call(x, adapters, INDICES, dropout=p))
    torch.manual_seed(1)
    by_hand = adapters._replace(weight=adapters.weight.bfloat16())
    ys.append(call(x.bfloat16(), by_hand, INDICES, dropout=p))
    assert torch.equal(*ys)
    found = [gradients(y, y.detach(), x, adapters) for y in ys]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert {gradient.dtype for gradient in found[0].values()} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_masks(use_reentrant):
    x, adapters = make()
    found = []
    layer = lambda x: call(x, adapters, INDICES, dropout=0.5)  # noqa: E731
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        x.grad = adapters.lora_a.grad = None
        run(x).square().sum().backward()
        found.append([x.grad, adapters.lora_a.grad])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_gradients(p):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    adapters = make_adapters([1, 1, 2], 2, 4, torch.float64, banks=False)
    leaves = [x, adapters.bias, *adapters.lora_a, *adapters.lora_b]

    def run(x, bias, *pairs):
        own = adapters._replace(bias=bias, lora_a=list(pairs[:3]), lora_b=list(pairs[3:]))
        torch.manual_seed(4)
        return call(x, own, INDICES[:3], dropout=p)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_many_gradients_at_once():
    x, adapters = make()
    y = call(x, adapters, INDICES)
    dys = torch.randn(3, *y.shape)
    leaves = [x, adapters.lora_a, adapters.lora_b]
    at_once = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        each = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for many, one in zip(at_once, each, strict=True):
            # The reference's gradient is NaN where a bank holds NaN that is never read.
            torch.testing.assert_close(many[i], one)


def test_transforms_of_torch_func():
    x, adapters = make(torch.float64, banks=False)
    lora_a = [tensor.detach() for tensor in adapters.lora_a]

    def loss(run):
        def of(x, *lora_a):
            settings = {"scales": adapters.scales, "bias": adapters.bias.detach()}
            lora_b = [tensor.detach() for tensor in adapters.lora_b]
            args = (x, adapters.weight, list(lora_a), lora_b, INDICES)
            return run(*args, **settings).square().sum()

        return grad(of, argnums=(0, 1, 2, 3))

    rows = x.detach()
    ours, theirs = (
        loss(run)(rows, *lora_a)
        for run in (fastlora.multi_lora_linear, reference.multi_lora_linear)
    )
    torch.testing.assert_close(ours, theirs)
    many = vmap(lambda x: call(x, adapters, INDICES))(torch.stack([rows, 2 * rows]))
    torch.testing.assert_close(many[1], call(2 * rows, adapters, INDICES))
    _, tangent = jvp(lambda x: call(x, adapters, INDICES), (rows,), (rows,))
    torch.testing.assert_close(tangent, call(rows, adapters, INDICES) - adapters.bias)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows, rows)
        assert forward_ad.unpack_dual(call(dual, adapters, INDICES)).tangent is not None


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        adapters = make()[1]
        for name in ("weight", "lora_a", "lora_b"):
            self.register_parameter(name, torch.nn.Parameter(getattr(adapters, name).detach()))

    def forward(self, x, indices, scales):
        options = {"scales": scales, "ranks": RANKS}
        tensors = (self.weight, self.lora_a, self.lora_b, indices)
        return fastlora.multi_lora_linear(x, *tensors, **options)


def test_export_and_functional_call():
    layer, x = Layer(), torch.randn(6, 8)
    arguments = (x, INDICES, torch.tensor([0.5, 1.0, 2.0]))
    expected = layer(*arguments)
    exported = torch.export.export(layer, arguments).module()
    torch.testing.assert_close(exported(*arguments), expected)
    other = (x, INDICES.flip(0), torch.tensor([0.5, 3.0, 2.0]))
    torch.testing.assert_close(exported(*other), layer(*other))
    tensors = {"lora_b": torch.zeros_like(layer.lora_b)}
    torch.testing.assert_close(functional_call(layer, tensors, arguments), x @ layer.weight.T)
