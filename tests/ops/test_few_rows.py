"""Calls with few rows use torch's operations instead of fastlora's node, with equal numbers."""

import pytest
import torch
from judge import make_projection

import fastlora
from fastlora.ops.few_rows import MOST_ROWS

K, N, RANK = 24, 17, 4


def is_node(y: torch.Tensor) -> bool:
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if "LoRALinearFunction" in node.name():
            return True
        nodes += [child for child, _ in node.next_functions if child is not None]
    return False


def call(
    x: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    **more,
) -> torch.Tensor:
    projection = make_projection(N, K, RANK, dtype, adapter_dtype, bias=True)
    for tensor in projection[1:3]:
        tensor.requires_grad_()
    return fastlora.lora_linear(x, *projection[:3], bias=projection.bias, **more)


def test_few_rows_use_torch_s_operations(monkeypatch):
    assert not is_node(call(torch.randn(MOST_ROWS, K)))
    assert is_node(call(torch.randn(MOST_ROWS + 1, K)))
    assert not is_node(call(torch.randn(MOST_ROWS, K), dropout=0.1))
    narrow = torch.randn(MOST_ROWS, K, dtype=torch.bfloat16)
    monkeypatch.setattr("fastlora.backends.products.FORCED", False)
    assert not is_node(call(narrow, torch.bfloat16, torch.float32))
    assert is_node(call(narrow, torch.bfloat16))  # the node scales h before it is rounded
    monkeypatch.setattr("fastlora.backends.products.FORCED", True)  # 16-bit products are slow
    monkeypatch.setattr("fastlora.ops.kinds.calls", {})
    assert is_node(call(narrow, torch.bfloat16, torch.float32))
    with fastlora.use_backend("triton"):
        assert is_node(call(torch.randn(1, K)))


@pytest.mark.parametrize("rows", [MOST_ROWS, MOST_ROWS + 1])
def test_the_result_is_not_a_view(rows):
    """The result isn't a view: an in-place change of a view drops hooks, and a view made under
    no_grad can't be changed in place.
    """
    x, seen = torch.randn(1, rows, K, requires_grad=True), []
    y = call(x)
    y.register_hook(lambda dy: seen.append(dy) or 2 * dy)
    y.mul_(3.0).sum().backward()
    assert torch.equal(*seen, torch.full_like(y, 3.0))
    assert y.shape == (1, rows, N)
    assert not y._is_view()
    with torch.no_grad():
        y = call(x)
    assert y.add_(torch.ones(N, requires_grad=True)).requires_grad
