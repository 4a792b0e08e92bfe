"""Experts on the torch backend: the operations and the memory of a call."""

import pytest
import torch
from judge import ends_of, make_experts, make_rows, peak_bytes
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.backends import BackwardCall, Call, find_backend
from fastlora.call.projection import Layout
from fastlora.call.rows import Rows


@pytest.fixture(autouse=True)
def torch_backend_only():
    with fastlora.use_backend("torch"):
        yield


class Seen(TorchDispatchMode):
    """Records the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def run(x, experts, offsets, p=0.0) -> Seen:
    """A forward and a backward of the backend, without autograd; the backward's operations."""
    weight, lora_a, lora_b, bias = experts
    given = [t for t in (x, weight, bias, lora_a, lora_b) if t is not None]
    tensors, needs = [t.detach() for t in given], [t.requires_grad for t in given]
    one = Call((Layout(bias is not None, (0.5,)),), p, find_backend(), Rows(offsets))
    seeds = torch.tensor([7]) if p else None
    ys, hs = one.backend.forward(tensors, seeds, one)
    with Seen() as backward:
        one.backend.backward(BackwardCall(ys, tensors, hs, needs, seeds, one))
    return backward


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_nothing_of_the_weight_s_size_is_made(p):
    """It computes no W + ΔW, and no gradient of a frozen weight."""
    experts = make_experts(16, 64, 64, 4, torch.float32, bias=True)
    x = make_rows(40, 64, torch.float32)
    for trains in (False, True):
        experts.weight.requires_grad_(trains)
        before, peak, _ = peak_bytes([x, *experts], lambda: run(x, experts, ends_of([5, 0] * 8), p))
        assert (peak - before >= experts.weight.nbytes) == trains


@pytest.mark.parametrize(
    ("trained", "products"), [("x", 3), ("weight", 1), ("lora_a", 2), ("lora_b", 1), ("bias", 0)]
)
def test_only_the_gradients_asked_for_are_computed(trained, products):
    experts = make_experts(3, 16, 8, 4, torch.float32, bias=True)
    x = make_rows(12, 8, torch.float32)
    for name, tensor in ({"x": x} | experts._asdict()).items():
        tensor.requires_grad_(name == trained)
    backward = run(x, experts, ends_of([5, 0, 7]))
    aten = torch.ops.aten
    found = sum(op in (aten.mm, aten.addmm, aten.addmm_) for op in backward.ops)
    assert found == products * 2  # two experts have rows
