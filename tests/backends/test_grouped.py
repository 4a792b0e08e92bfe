"""Experts on the torch backend: what a call makes and what it doesn't."""

import pytest
import torch
from experts import call, ends_of, make_experts, make_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.backends import Settings, find_backend
from fastlora.projection import Layout
from fastlora.segments import Segments


@pytest.fixture(autouse=True)
def torch_backend_only():
    with fastlora.use_backend("torch"):
        yield


class Seen(TorchDispatchMode):
    """The operations that run, and the most elements of a new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket)
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return out


def run(x, experts, offsets, p=0.0):
    """A forward and a backward of the backend itself, without autograd."""
    weight, lora_a, lora_b, bias = experts
    given = [t for t in (x, weight, bias, lora_a, lora_b) if t is not None]
    tensors, needs = [t.detach() for t in given], [t.requires_grad for t in given]
    settings = Settings((Layout(bias is not None, (0.5,)),), p, find_backend())
    seeds = torch.tensor([7]) if p else None
    segments = Segments(offsets)
    y, h = settings.backend.forward_grouped(tensors, segments, seeds, settings)
    forward = Seen()
    with forward:
        settings.backend.forward_grouped(tensors, segments, seeds, settings)
    backward = Seen()
    with backward:
        settings.backend.backward_grouped(y, tensors, segments, h, needs, seeds, settings)
    return forward, backward


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_nothing_of_the_weight_s_size_is_made(p):
    """No W + ΔW, and no gradient of a frozen weight."""
    experts = make_experts(16, 64, 64, 4, torch.float32, bias=True)
    x = make_rows(40, 64, torch.float32)
    forward, backward = run(x, experts, ends_of([5, 0] * 8), p)
    of_y = 40 * 64
    assert max(forward.largest, backward.largest) <= max(of_y, 16 * 64 * 4 * 2)
    experts.weight.requires_grad_()
    assert run(x, experts, ends_of([5, 0] * 8), p)[1].largest >= 16 * 64 * 64


@pytest.mark.parametrize(
    ("trained", "products"),
    [("x", 3), ("weight", 1), ("lora_a", 2), ("lora_b", 1), ("bias", 0)],
)
def test_only_the_gradients_asked_for_are_computed(trained, products):
    experts = make_experts(3, 16, 8, 4, torch.float32, bias=True)
    x = make_rows(12, 8, torch.float32)
    for name, tensor in ({"x": x} | experts._asdict()).items():
        tensor.requires_grad_(name == trained)
    _, backward = run(x, experts, ends_of([5, 0, 7]))
    aten = torch.ops.aten
    found = sum(op in (aten.mm, aten.addmm, aten.addmm_) for op in backward.ops)
    assert found == products * 2  # of two experts


def test_few_rows_of_a_16_bit_x_beside_float32_adapters(monkeypatch):
    """An expert with no more rows than its adapter multiplies in float32, as a layer's node."""
    monkeypatch.setattr("fastlora.backends.torch.MOST_ROWS", 0)
    monkeypatch.setattr("fastlora.ops.kinds._known", {})
    experts = make_experts(2, 16, 8, 4, torch.bfloat16, torch.float32)
    x = make_rows(12, 8, torch.bfloat16)
    y = call(x, experts, ends_of([2, 10]))
    for e, rows in enumerate((slice(0, 2), slice(2, 12))):
        assert torch.equal(y[rows], fastlora.lora_linear(x[rows], *[t[e] for t in experts[:3]]))


def test_masks_go_on_from_one_part_to_the_next():
    weight, lora_a, lora_b, _ = make_experts(2, 6, 8, 3, torch.float32)
    settings, seeds = Settings((Layout(False, (0.5,)),), 0.3, find_backend()), torch.tensor([7])
    x, backend = torch.randn(7, 8), settings.backend

    def forward(rows, experts, segments):
        inputs = [x[rows], *(t.detach()[experts] for t in (weight, lora_a, lora_b))]
        return backend.forward_grouped(inputs, segments, seeds, settings)[0]

    whole = forward(slice(0, 7), slice(0, 2), Segments(ends_of([4, 3])))
    assert torch.equal(forward(slice(4, 7), slice(1, 2), Segments(ends_of([3]), 4)), whole[4:])
