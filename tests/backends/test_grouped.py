"""Experts on the torch backend: which way a call runs, and what each of them doesn't do."""

import pytest
import torch
from experts import call, ends_of, make_experts, make_rows
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.backends import Settings, find_backend, grouped
from fastlora.projection import Layout
from fastlora.segments import Segments


@pytest.fixture(autouse=True)
def torch_backend_only():
    with fastlora.use_backend("torch"):
        yield


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(grouped, "FORCED", True)


both_ways = pytest.mark.parametrize("forced", [False, True], ids=["in-turn", "at-once"])


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


def weight_of(n: int = 16, k: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, n, k).to(dtype)


LIMITS = {
    "float32": (weight_of(), True),
    "bfloat16": (weight_of(dtype=torch.bfloat16), True),
    "float16": (weight_of(dtype=torch.float16), True),
    "float64": (weight_of(dtype=torch.float64), False),
    "transposed": (weight_of().mT.contiguous().mT, True),
    "one-for-all": (weight_of()[:1].expand(3, 16, 8), True),
    "odd-n": (weight_of(n=15), False),
    "odd-k": (weight_of(k=7), False),
    "4-features-of-16-bits": (weight_of(k=4, dtype=torch.bfloat16), False),
    "every-second-feature": (weight_of(k=16)[..., ::2], False),
    "odd-stride": (weight_of(k=9)[..., :8], False),
    "odd-stride-between-experts": (torch.randn(3 * 129).as_strided((3, 16, 8), (129, 8, 1)), False),
    "odd-address": (torch.randn(3 * 128 + 1)[1:].view(3, 16, 8), False),
    "1024-experts": (torch.randn(1024, 8, 8), False),
    "rows-that-overlap": (torch.randn(3, 16, 1).expand(3, 16, 8), False),
}


@pytest.mark.parametrize(("weight", "fits"), LIMITS.values(), ids=LIMITS)
def test_limits_of_grouped_mm(weight, fits, at_once):
    """What we take, torch takes: the products that a call makes of the weight, and no error."""
    x = torch.randn(5, weight.shape[2], dtype=weight.dtype)
    assert grouped.runs_at_once(x, weight) is fits
    if fits:
        functional.grouped_mm(x, weight.mT, offs=ends_of([1, 1, 3]))
        functional.grouped_mm(x @ weight[0].T, weight, offs=ends_of([1, 1, 3]))


def test_without_rows_nothing_is_multiplied_at_once(at_once):
    assert not grouped.runs_at_once(torch.randn(0, 8), weight_of())


def test_a_torch_without_grouped_mm(at_once, monkeypatch):
    monkeypatch.delattr(functional, "grouped_mm")
    assert not grouped.runs_at_once(torch.randn(5, 8), weight_of())


def test_a_cpu_takes_the_experts_in_turn():
    weight = weight_of(dtype=torch.bfloat16)
    assert not grouped.runs_at_once(torch.randn(5, 8, dtype=torch.bfloat16), weight)


@pytest.mark.parametrize(
    ("version", "hip", "has"), [((8, 0), None, False), ((9, 0), None, True), ((10, 0), None, True),
                                ((12, 0), None, False), ((9, 4), "7.0", False)],
)  # fmt: skip
def test_which_gpus_have_a_kernel(version, hip, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert grouped._has_kernel.__wrapped__(torch.device("cuda", 0)) is has


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_at_once_nothing_is_read_on_the_host(p, at_once, monkeypatch):
    """Nor does a loop run: the operations are as many, however many the experts are."""
    monkeypatch.setattr(Segments, "slices", lambda *_: pytest.fail("the offsets were read"))
    ops = []
    for counts in ([3, 0, 9], [1, 2, 3, 0, 0, 1, 5]):
        experts = make_experts(len(counts), 16, 8, 3, torch.bfloat16, torch.float32, bias=True)
        experts.weight.requires_grad_()
        seen = run(make_rows(14, 8, torch.bfloat16), experts, ends_of(counts), p)
        ops.append([op for each in seen for op in each.ops])
    assert torch.ops.aten._local_scalar_dense not in ops[0]
    assert ops[0] == ops[1]


@both_ways
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_nothing_of_the_weight_s_size_is_made(forced, p, monkeypatch):
    """No W + ΔW, and no gradient of a frozen weight."""
    monkeypatch.setattr(grouped, "FORCED", forced)
    experts = make_experts(16, 64, 64, 4, torch.float32, bias=True)
    x = make_rows(40, 64, torch.float32)
    forward, backward = run(x, experts, ends_of([5, 0] * 8), p)
    of_y = 40 * 64
    assert max(forward.largest, backward.largest) <= max(of_y, 16 * 64 * 4 * 2)
    experts.weight.requires_grad_()
    assert run(x, experts, ends_of([5, 0] * 8), p)[1].largest >= 16 * 64 * 64


@both_ways
@pytest.mark.parametrize(
    ("trained", "products"),
    [("x", 3), ("weight", 1), ("lora_a", 2), ("lora_b", 1), ("bias", 1)],
)
def test_only_the_gradients_asked_for_are_computed(trained, products, forced, monkeypatch):
    monkeypatch.setattr(grouped, "FORCED", forced)
    experts = make_experts(3, 16, 8, 4, torch.float32, bias=True)
    x = make_rows(12, 8, torch.float32)
    for name, tensor in ({"x": x} | experts._asdict()).items():
        tensor.requires_grad_(name == trained)
    _, backward = run(x, experts, ends_of([5, 0, 7]))
    aten = torch.ops.aten
    names = (aten._grouped_mm,) if forced else (aten.mm, aten.addmm, aten.addmm_)
    found = sum(op in names for op in backward.ops)
    in_turn = 0 if trained == "bias" else products * 2  # of two experts; Σ dy is no product there
    assert found == (products if forced else in_turn)


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
