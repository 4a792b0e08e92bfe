"""Captured calls: the operations in them, and the placement of their buffers."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import buffers_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.kernels.capture import capture_call
from fastlora.kernels.sum_planes import sum_planes


def ordinary(tensors, factor):
    """Makes a view, a copy, two results, and a tensor that is never used."""
    x, other = tensors
    torch.zeros_like(x)
    wide = torch.cat([x, other.T])
    left, right = wide.split([2, len(wide) - 2])
    total = torch.addmm(left.new_empty(2, 2), left, x.T, beta=0, out=None)
    return [total * factor, None, torch.add(right, 1)]


def test_a_replay_gives_the_results_of_its_call():
    tensors = [torch.randn(2, 3), torch.randn(3, 5)]
    made = capture_call(ordinary, tensors, (0.5,))
    again = [torch.randn(2, 3), torch.randn(3, 5)]
    for each in (tensors, again):
        found, expected = made.replay(None, *each), ordinary(each, 0.5)
        assert found[1] is None
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[2], expected[2])


def test_unused_operations_are_not_captured():
    made = capture_call(ordinary, [torch.randn(2, 3), torch.randn(3, 5)], (0.5,))
    assert "zeros_like" not in made.source


def test_tensors_are_freed_after_their_last_use():
    made = capture_call(ordinary, [torch.randn(2, 3), torch.randn(3, 5)], (0.5,))
    alive: set[str] = set()
    for line in made.source.strip().splitlines()[1:]:
        code, _, gone = line.strip().partition(";  ")
        alive |= set(re.findall(r"^(\w+) = ", code))
        alive -= set(gone.split(" = "))
    assert len(alive) == 2
    assert sorted(alive) == sorted(re.findall(r"\w+(?=[,\]])", code.replace("None", "")))


def test_a_view_knows_its_address_in_inference_mode():
    found = []

    def look(tensors):
        found.append(tensors[0].T[1:].data_ptr() % 16)
        return []

    with torch.inference_mode():
        capture_call(look, [torch.empty(7)[1:].view(2, 3)], ())
    assert found == [8]


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        SEEN.add(function)
        return function(*arguments, **keywords or {})


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        SEEN.add(operation)
        return operation(*arguments, **keywords or {})


SEEN: set = set()


@pytest.mark.parametrize("mode", [Functions, Operations])
def test_modes_of_the_caller_s_do_not_see_stand_ins(mode):
    """Modes count, log or check computations, and a capture computes nothing."""
    tensors = [torch.randn(2, 3), torch.randn(3, 5)]
    SEEN.clear()
    with mode():
        made = capture_call(ordinary, tensors, (0.5,))
        assert not SEEN & {torch.cat, torch.ops.aten.cat.default}
        made.replay(None, *tensors)
    assert SEEN & {torch.cat, torch.ops.aten.cat.default}


def test_a_buffer_that_is_needed_as_a_tensor_has_its_own_memory():
    def function(tensors):
        planes = [tensors[0].new_empty(2, 8) for _ in range(2)]
        sums = [tensors[0].new_empty(8) for _ in range(2)]
        planes[1].copy_(tensors[0])
        sum_planes(planes, sums)
        return [sums[1]]

    x = torch.randn(2, 8)
    made = capture_call(function, [x], ())
    shapes = {name: tuple(like.shape) for name, like in buffers_of(made).items()}
    assert list(shapes.values()) == [(1024,), (2, 8), (8,)]
    assert shapes["workspace"] == (1024,)
    assert torch.equal(made.replay(None, x)[0], x.sum(0))


def test_threads_may_capture_at_one_time():
    def captured(_):
        return capture_call(ordinary, [torch.randn(2, 3), torch.randn(3, 5)], (0.5,)).source

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(captured, range(16)))) == 1


def test_a_tensor_that_is_no_argument_is_a_constant():
    """For example a cached table, whose address a launch uses."""
    table = torch.ones(4)

    def function(tensors):
        assert table.data_ptr()
        return [tensors[0].new_empty(4)]

    (made,) = capture_call(function, [torch.zeros(4)], ()).replay(None, torch.zeros(4))
    assert made.shape == (4,)
