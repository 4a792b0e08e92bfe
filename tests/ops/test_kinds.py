"""A call with a known cache key isn't checked again, so the key holds everything checks look at."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora.ops import functional, kinds

M, K, N, R = 5, 8, 6, 2


def tensors(**changes):
    shapes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | changes


def call(x, weight, lora_a, lora_b, **settings):
    return fastlora.lora_linear(x, weight, lora_a, lora_b, **settings)


@pytest.fixture
def checks(monkeypatch):
    """The checks that ran: one element for each call that was checked."""
    seen, real = [], functional.check_call
    monkeypatch.setattr(functional, "check_call", lambda *all: seen.append(real(*all)))
    monkeypatch.setattr(kinds, "calls", {})
    call(**tensors())
    assert len(seen) == 1
    return seen


def test_a_second_call_is_not_checked(checks):
    call(**tensors())
    call(**tensors(weight=torch.randn(N, K)), scale=1.0, training=True)
    assert len(checks) == 1


def test_a_base_with_two_adapters_is_not_two_bases(checks):
    each = tensors(x=torch.randn(M, K))
    one = fastlora.Projection(torch.randn(K, K), torch.randn(K, K), torch.randn(K, K))
    (y,) = fastlora.lora_linears(each["x"], [one, one._replace(weight=None)])
    first, second = fastlora.lora_linears(each["x"], [one, one])
    base = each["x"] @ one.weight.T
    torch.testing.assert_close(y - base, 2 * (first - base))
    assert torch.equal(first, second)


def test_each_dtype_of_autocast_is_a_kind(checks):
    each = tensors(x=torch.randn(M, K, requires_grad=True))
    for dtype in (torch.bfloat16, torch.float16):
        found = []
        for _ in range(2):
            with torch.autocast("cpu", dtype):
                y = call(**each)
            assert y.dtype == dtype
            found.append((y, *torch.autograd.grad(y.float().square().sum(), each["x"])))
        torch.testing.assert_close(*found, rtol=0, atol=0)
        base = each["x"].to(dtype) @ each["weight"].to(dtype).T
        truth = base.float() + each["x"] @ (each["lora_b"] @ each["lora_a"]).T
        torch.testing.assert_close(found[1][0].float(), truth, rtol=0.05, atol=0.1)
    call(**each | {"x": torch.randn(M, K)})  # and without autocast
    assert len(checks) == 3


def test_cache_keys_distinguish_autocast_transforms_and_inference_tensors():
    each = tensors()
    plain = call(**each)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(**each).dtype == torch.bfloat16
    jacobian = torch.func.jacrev(lambda x: call(**each | {"x": x}))(each["x"])
    assert jacobian.shape == (M, N, M, K)
    with torch.inference_mode():
        made = tensors()
        call(**made)
    made["lora_a"] = nn.Parameter(torch.randn(R, K))
    with pytest.raises(TypeError, match="inference mode"):
        call(**made)
    assert torch.equal(plain, call(**each))
