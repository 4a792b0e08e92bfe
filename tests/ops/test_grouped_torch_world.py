"""What surrounds experts in training: autocast, checkpointing, torch.func, forward mode."""

import pytest
import torch
from device import DEVICE
from experts import call, ends_of, make_experts, make_rows
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import reference

pytestmark = pytest.mark.usefixtures("backend")
COUNTS = [4, 0, 3]


def make(dtype: torch.dtype = torch.float32):
    return make_rows(9, 8, dtype), make_experts(3, 6, 8, 2, dtype, bias=True), ends_of(COUNTS)


def gradients(y, x, experts):
    return torch.autograd.grad(y.float().square().sum(), [x, *experts[1:]])


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_the_weight(dtype, p):
    x, experts, offsets = make()
    ys = []
    torch.manual_seed(1)
    with torch.autocast(DEVICE, dtype=dtype):
        ys.append(call(x, experts, offsets, dropout=p))
    torch.manual_seed(1)
    by_hand = experts._replace(weight=experts.weight.to(dtype))
    ys.append(call(x.to(dtype), by_hand, offsets, dropout=p))
    assert ys[0].dtype == dtype
    assert torch.equal(*ys)
    found = gradients(ys[0], x, experts)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    assert all(map(torch.equal, found, gradients(ys[1], x, experts)))


def test_autocast_leaves_float64_alone():
    x, experts, offsets = make(torch.float64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert call(x, experts, offsets).dtype == torch.float64


def test_backward_inside_autocast_of_a_call_outside():
    x, experts, offsets = make()
    outside = gradients(call(x, experts, offsets), x, experts)
    y = call(x, experts, offsets)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = gradients(y, x, experts)
    assert all(map(torch.equal, outside, inside))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(use_reentrant):
    x, experts, offsets = make()
    found = []
    layer = lambda x: call(x, experts, offsets, dropout=0.5)  # noqa: E731
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        x.grad = experts.lora_a.grad = None
        run(x).square().sum().backward()
        found.append([x.grad, experts.lora_a.grad])
    assert all(map(torch.equal, *found))


def test_under_a_mode_that_sees_every_operation():
    from torch.utils.flop_counter import FlopCounterMode

    x, experts, offsets = make()
    plain = gradients(call(x, experts, offsets), x, experts)
    with FlopCounterMode(display=False):
        counted = gradients(call(x, experts, offsets), x, experts)
    assert all(map(torch.equal, plain, counted))


def ours(x, weight, lora_a, lora_b, bias, offsets):
    return fastlora.lora_grouped(x, weight, lora_a, lora_b, offsets, bias=bias, scale=0.5)


def theirs(x, weight, lora_a, lora_b, bias, offsets):
    return reference.lora_grouped(x, weight, lora_a, lora_b, offsets, bias=bias, scale=0.5)


def transforms():
    x, experts, offsets = make(torch.float64)
    tensors = [x.detach(), *[t.detach() for t in experts]]

    def loss(run):
        return lambda *tensors: run(*tensors, offsets).square().sum()

    return {
        "grad": lambda run: grad(loss(run), argnums=tuple(range(5)))(*tensors),
        "grad-of-grad": lambda run: grad(lambda x: grad(loss(run))(x, *tensors[1:]).square().sum())(
            tensors[0]
        ),
        "jvp": lambda run: jvp(lambda *t: run(*t, offsets), tuple(tensors), tuple(tensors)),
        "vmap": lambda run: vmap(lambda x: run(x, *tensors[1:], offsets))(torch.stack([x, 2 * x])),
        "vmap-of-adapters": lambda run: vmap(
            lambda a: grad(lambda a: loss(run)(*tensors[:2], a, *tensors[3:]))(a)
        )(torch.stack([tensors[2], tensors[2].flip(0)])),
    }


@pytest.mark.parametrize("name", transforms())
def test_transforms_of_torch_func(name):
    torch.manual_seed(7)
    run = transforms()[name]
    torch.testing.assert_close(run(ours), run(theirs))


def test_forward_mode():
    x, experts, offsets = make(torch.float64)
    tangent, found = torch.randn_like(x), []
    for run in (ours, theirs):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), tangent)
            found.append(forward_ad.unpack_dual(run(dual, *experts, offsets)).tangent)
    torch.testing.assert_close(*found)


def test_functional_call_is_the_node():
    x, experts, offsets = make()
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(experts.lora_b.detach())
    layer.forward = lambda x: call(x, experts._replace(lora_b=layer.weight), offsets)
    y = functional_call(layer, {"weight": experts.lora_b}, (x,))
    assert type(y.grad_fn).__name__ == "LoRALinearFunctionBackward"
