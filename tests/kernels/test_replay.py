"""Captured and replayed calls, against the same calls made step by step."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import triton
from kernel_cases import buffers_of

import fastlora
from fastlora.backends.triton import verification
from fastlora.common import remembered
from fastlora.kernels import launchers as kernels
from fastlora.kernels import replay
from fastlora.kernels.capture import CapturedCall
from fastlora.kernels.launch import Launch, intercept, launch, recording
from fastlora.ops import kinds

K = 40


@contextmanager
def captured():
    """The calls that are captured inside the block."""
    real, new = kernels.capture_call, []

    def capture(*call):
        new.append(real(*call))
        return new[-1]

    kernels.capture_call = capture
    try:
        yield new
    finally:
        kernels.capture_call = real


def projection(out=24, r=4, dtype=torch.float32, **changes):
    tensors = {
        "weight": torch.randn(out, K, dtype=dtype),
        "lora_a": torch.randn(r, K, requires_grad=True),
        "lora_b": torch.randn(out, r, requires_grad=True),
        "bias": torch.randn(out, requires_grad=True),
        "scale": 0.5,
    }
    return fastlora.Projection(**tensors | changes)


def frozen(out=24, r=4):
    return projection(out, r, lora_a=torch.randn(r, K), lora_b=torch.randn(out, r), bias=None)


def step(x, projections, p=0.0):
    """Outputs and gradients of one training step; tests compare them bit for bit."""
    torch.manual_seed(3)
    leaves = [x] + [t for one in projections for t in one[:4] if t is not None and t.requires_grad]
    ys = fastlora.lora_linears(x, projections, dropout=p, backend="triton")
    return [*ys, *torch.autograd.grad(ys, leaves, [torch.sin(y.detach()) for y in ys])]


def test_a_new_kind_inside_a_capture_is_an_error_and_a_known_one_is_not(monkeypatch):
    x, group = torch.randn(5, K, requires_grad=True), [projection()]
    step(x, group)
    monkeypatch.setattr(replay, "is_in_graph_capture", lambda device: True)
    step(x, group)
    with pytest.raises(RuntimeError, match="Run the same step once before"):
        step(torch.randn(6, K, requires_grad=True), group)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, one: (x[:-1], one),
        lambda x, one: (x.detach().T.contiguous().T.requires_grad_(), one),
        lambda x, one: (torch.randn(33 * K + 1)[1:].view(33, K).requires_grad_(), one),
        lambda x, one: (x, one._replace(scale=0.25)),
        lambda x, one: (x, one._replace(lora_a=one.lora_a.detach())),
        lambda x, one: (x.detach().bfloat16().requires_grad_(), projection(dtype=torch.bfloat16)),
    ],
    ids=["rows", "strides", "address", "scale", "needs", "dtype"],
)
def test_each_relevant_change_captures_a_new_call(change):
    x, one = torch.randn(33, K, requires_grad=True), projection()
    step(x, [one])
    x, one = change(x, one)
    with captured() as new:
        found = step(x, [one])
    assert len(new) == 2  # forward and backward
    with intercept(Launch.run):
        assert all(map(torch.equal, found, step(x, [one])))


def test_one_tensor_for_two_arguments_and_then_two_tensors():
    """A capture knows positions of arguments, not tensors, so equal tensors may differ later."""
    square = torch.randn(K, K)
    shared = fastlora.Projection(square, square, square)
    apart = fastlora.Projection(*(torch.randn(K, K) for _ in range(3)))
    for one in (shared, apart):
        x = torch.randn(K, K)
        (y,) = fastlora.lora_linears(x, [one], backend="triton")
        with intercept(Launch.run):
            assert torch.equal(y, fastlora.lora_linears(x, [one], backend="triton")[0])


def test_a_saved_h_may_come_back_in_another_layout():
    """Hooks on saved tensors may change the layout; kernels need contiguous rows."""
    x, one = torch.randn(28, K, requires_grad=True), projection()
    expected = step(x, [one])

    def pack(tensor):
        return torch.nn.functional.pad(tensor, (0, 3)) if tensor.dim() == 2 else tensor

    def unpack(tensor):
        return tensor[:, :-3] if tensor.dim() == 2 else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert all(map(torch.equal, expected, step(x, [one])))


class Slow(dict):
    """A dict that lets other threads run while it finds its first key and after it removes one."""

    def __iter__(self):
        keys = super().__iter__()
        time.sleep(0.001)
        return keys

    def __delitem__(self, key):
        super().__delitem__(key)
        time.sleep(0.001)

    def pop(self, *key):
        super().pop(*key)
        time.sleep(0.001)


def test_threads_may_capture_calls_concurrently(monkeypatch):
    """Each thread evicts the oldest entry for its own new one."""
    monkeypatch.setattr(remembered, "MOST", 2)
    captured = CapturedCall(lambda stream, x: [x], "", [], frozenset())
    monkeypatch.setattr(kernels, "capture_call", lambda *_: captured)
    calls = Slow()

    function = verification.KernelFunction(step, step, lambda *_: True)

    def call(first):
        for i in range(first, 40, 4):
            verification.run_kernels(function, [torch.empty(1)], (i,), calls)

    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(call, range(4))] == [None] * 4  # and no error
    assert len(calls) == 2


def test_a_capture_keeps_no_tensor_of_the_caller():
    with captured() as new:
        step(torch.randn(51, K, requires_grad=True), [projection()])
    assert len(new) == 2
    for call in new:
        constants = vars(call.replay.__self__).values()
        assert not any(isinstance(each, torch.Tensor) for each in constants)
        buffers = buffers_of(call).values()
        assert buffers
        assert all(each.untyped_storage().nbytes() <= 8 for each in buffers)  # one element


def test_the_oldest_captures_are_evicted(monkeypatch):
    monkeypatch.setattr(replay, "calls", {})
    monkeypatch.setattr(kinds, "calls", {})
    monkeypatch.setattr(remembered, "MOST", 4)
    one = projection()
    for rows in range(1, 8):
        step(torch.randn(rows, K, requires_grad=True), [one])
    assert len(replay.calls) == len(kinds.calls) == 4
    with captured() as new:
        step(torch.randn(7, K, requires_grad=True), [one])
    assert not new


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_launch_hook_sees_every_launch(name):
    """Profilers set launch hooks; the call then runs step by step through Triton's own launches."""
    chain = getattr(triton.knobs.runtime, name)
    x, one = torch.randn(61, K), frozen()
    chain.add(print)
    try:
        with captured() as new:
            fastlora.lora_linears(x, [one], backend="triton")
    finally:
        chain.remove(print)
    assert not new


def test_a_capture_is_thread_local():
    """During a capture, a launch by another thread runs normally."""

    class Fake:
        ran = False

        def run(self):
            self.ran = True

    fake, recorded = Fake(), []
    with recording(recorded.append):
        thread = threading.Thread(target=launch, args=(fake,))
        thread.start()
        thread.join()
        assert fake.ran
        launch(fake)
    assert recorded == [fake]
