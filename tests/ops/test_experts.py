"""The autograd node of experts against the formula, computed token by token."""

import oracles
import pytest
import torch
from judge import peak_bytes, saved_bytes
from torch import nn

from fastlora.backends import find_backend
from fastlora.call.projection import Adapter, Base, Output
from fastlora.ops import experts
from fastlora.ops.experts import lora_experts

E, K, INNER, N = 4, 8, 5, 6


def stacked(out, features, r, dtype, bias=False, adapter_dtype=None):
    adapter = Adapter(
        torch.randn(E, r, features, dtype=adapter_dtype or dtype).requires_grad_(),
        torch.randn(E, out, r, dtype=adapter_dtype or dtype).requires_grad_(),
        0.5,
    )
    shift = torch.randn(E, out, dtype=dtype).requires_grad_() if bias else None
    return Output(
        Base(torch.randn(E, out, features, dtype=dtype) / features**0.5, shift), (adapter,)
    )


def leaves_of(*outputs):
    tensors = []
    for (weight, bias), ((lora_a, lora_b, _),) in outputs:
        tensors += [t for t in (weight, bias, lora_a, lora_b) if t is not None and t.requires_grad]
    return tensors


def textbook(x, index, weights, up, down, activation):
    """Each token through its experts, one by one; an index of E or more means no expert."""
    rows = []
    for token, chosen, shares in zip(x, index.tolist(), weights, strict=True):
        total = x.new_zeros(len(down.base.weight[0]))
        for e, share in zip(chosen, shares, strict=True):
            if e < E:
                pre = one(token, up, e)
                total = total + share * one(activation(pre[None])[0], down, e)
        rows.append(total)
    return torch.stack(rows)


def one(token, output, e):
    (weight, bias), ((lora_a, lora_b, scale),) = output
    y = weight[e] @ token + scale * (lora_b[e] @ (lora_a[e] @ token))
    return y if bias is None else y + bias[e]


def silu_of_halves(pre):
    gate, up = pre.chunk(2, dim=1)
    return nn.functional.silu(gate) * up


def square(pre):
    return torch.relu(pre).square()


# Values: the activation passed to the node, the same as a function, and the number of columns of
# the first product.
ACTIVATIONS = {
    "named": ("silu", silu_of_halves, 2 * INNER),
    "function": (silu_of_halves, silu_of_halves, 2 * INNER),
    "no-gate": (square, square, INNER),
}
ROUTES = {
    "spread": lambda: torch.stack([torch.randperm(E)[:2] for _ in range(9)]),
    "nobody": lambda: torch.tensor([[0, E], [E, E + 3], [3, 0], [E, 2]]),
    "one-has-all": lambda: torch.full((5, 1), 2),
    "the-first-has-all": lambda: torch.full((5, 1), 0),
    "one-token": lambda: torch.tensor([[1, 0, 3]]),
    "int32": lambda: torch.tensor([[1, 0], [3, 1]], dtype=torch.int32),
}


@pytest.mark.parametrize("in_parts", [False, True], ids=["", "parts"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("route", ROUTES)
def test_outputs_and_gradients(route, activation, bias, in_parts, monkeypatch):
    if in_parts:
        monkeypatch.setattr(experts, "rows_at_a_time", lambda x: 3)
    activate, function, columns = ACTIVATIONS[activation]
    index = ROUTES[route]()
    x = torch.randn(len(index), K, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    up, down = (
        stacked(columns, K, 3, torch.float64, bias),
        stacked(N, INNER, 2, torch.float64, bias),
    )
    leaves = [x, weights, *leaves_of(up, down)]
    out = lora_experts(x, index, weights, up, down, activate)
    expected = textbook(x, index, weights, up, down, function)
    torch.testing.assert_close(out, expected)
    dy = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, leaves, dy, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, dy), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_has_a_mask_for_each_projection(monkeypatch):
    index, p, seeds = ROUTES["nobody"](), 0.4, torch.tensor([3, 4])
    monkeypatch.setattr(experts, "draw_seed", lambda count, device: seeds[:count])
    x = torch.randn(len(index), K, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    up, down = stacked(2 * INNER, K, 3, torch.float64), stacked(N, INNER, 2, torch.float64)
    order, ends, k = experts.routing_of(index, E)
    masks = [
        find_backend().dropout_mask(seeds[i : i + 1], (len(order), width), p)
        for i, width in enumerate((K, INNER))
    ]

    def one_product(rows, output, mask):
        (weight, _), ((lora_a, lora_b, scale),) = output
        return oracles.grouped_lora_linear(
            rows, weight, lora_a, lora_b, ends, scale=scale, dropout=p, mask=mask
        )

    y = one_product(silu_of_halves(one_product(x[order // k], up, masks[0])), down, masks[1])
    shares = weights.flatten()[order].unsqueeze(1)
    expected = torch.zeros_like(x[:, :N]).index_add(0, order // k, y * shares)
    leaves = [x, weights, *leaves_of(up, down)]
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, dy)
    out = lora_experts(x, index, weights, up, down, "silu", dropout=p)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, dy), wanted)


def test_gradients_of_gradients_are_an_error():
    up, down = stacked(2 * INNER, K, 3, torch.float64), stacked(N, INNER, 2, torch.float64)
    x, index = torch.randn(2, K, dtype=torch.float64, requires_grad=True), torch.tensor([[0], [1]])
    out = lora_experts(x, index, torch.ones(2, 1), up, down, "silu")
    with pytest.raises(RuntimeError, match="for each expert"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("alone", [False, True], ids=["", "second-alone"])
def test_separate_steps_compute_the_same(alone):
    """The activation may be called only once."""
    up, down = stacked(2 * INNER, K, 3, torch.float64), stacked(N, INNER, 2, torch.float64)
    if alone:
        up = up._replace(adapters=())
    x, calls = torch.randn(2 * E, K, dtype=torch.float64, requires_grad=True), []

    def once(pre):
        calls.append(pre)
        return silu_of_halves(pre)

    index = torch.arange(E).repeat_interleave(2).unsqueeze(1)
    weights = torch.ones(2 * E, 1, dtype=torch.float64)
    leaves = [x, *(t for t in (*up.adapters, *down.adapters) for t in t[:2])]
    results = []
    for activate, one_node in (("silu", True), (once, False)):
        out = lora_experts(x, index, weights, up, down, activate, one_node=one_node)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert len(calls) == 1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("chosen", range(6))
def test_only_what_is_needed_gets_a_gradient(chosen):
    index = ROUTES["spread"]()
    x, weights = torch.randn(9, K), torch.rand(9, 2)
    up, down = stacked(2 * INNER, K, 3, torch.float32), stacked(N, INNER, 2, torch.float32)
    leaves = [x, weights, *leaves_of(up, down)]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == chosen)
    lora_experts(x, index, weights, up, down, "silu").sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == chosen for i in range(6)]


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_in_16_bits_no_further_from_the_truth_than_rounding(weight_dtype):
    index = ROUTES["spread"]()
    x = torch.randn(9, K).bfloat16().requires_grad_()
    weights = torch.rand(9, 2).to(weight_dtype).requires_grad_()
    up = stacked(2 * INNER, K, 3, torch.bfloat16, adapter_dtype=torch.float32)
    down = stacked(N, INNER, 2, torch.bfloat16, adapter_dtype=torch.float32)
    out = lora_experts(x, index, weights, up, down, "silu")
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    wide = [t.detach().double().requires_grad_() for t in (x, weights, *leaves_of(up, down))]
    adapted = [
        Output(Base(each.base.weight.double(), None), (Adapter(*wide[i : i + 2], 0.5),))
        for i, each in ((2, up), (4, down))
    ]
    expected = textbook(wide[0], index, wide[1], *adapted, silu_of_halves)
    expected.sum().backward()
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 0.02
    for ours, theirs in zip((x, weights, *leaves_of(up, down)), wide, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert (ours.grad.double() - theirs.grad).norm() < 0.03 * theirs.grad.norm()


@pytest.mark.parametrize("routed", [False, True], ids=["frozen-router", "router"])
def test_tensors_saved_for_backward(routed):
    """It saves pre, both h and the routing, but no rows of x or y, even if the router trains."""
    index = torch.stack([torch.randperm(E)[:2] for _ in range(64)])
    x, weights = torch.randn(64, K, requires_grad=True), torch.rand(64, 2, requires_grad=routed)
    up, down = stacked(2 * INNER, K, 3, torch.float32), stacked(N, INNER, 2, torch.float32)
    own = [x, weights, *leaves_of(up, down), up.base.weight, down.base.weight]
    found = sum(
        saved_bytes(lambda: lora_experts(x, index, weights, up, down, "silu"), own).values()
    )
    rows = 128
    assert found == 4 * rows * (2 * INNER + 3 + 2) + 8 * rows + 4 * E


def test_temporary_memory_is_bounded(monkeypatch):
    """The temporary memory on a CPU, besides saved tensors: the rows of a few experts at a time."""
    monkeypatch.setattr(experts, "rows_at_a_time", lambda x: 64)
    index = torch.stack([torch.randperm(E)[:2] for _ in range(512)])
    x, weights = torch.randn(512, 64, requires_grad=True), torch.rand(512, 2, requires_grad=True)
    up, down = stacked(32, 64, 2, torch.float32), stacked(64, 16, 2, torch.float32)

    def step():
        lora_experts(x, index, weights, up, down, "silu").sum().backward()

    before, peak, _ = peak_bytes([x, weights, *leaves_of(up, down)], step)
    kept = 4 * 1024 * (32 + 2 + 2)
    # in units of x: 4 for the rows of both experts of each token
    assert peak - before < kept + 6 * x.nbytes
