"""Scripts of calls: what is in them, what isn't, and where buffers lie."""

import re
import threading
from itertools import combinations
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.kernels import script
from fastlora.kernels.script import script_of


def lines_of(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines()[1:]]


def ordinary(tensors, factor):
    """Makes a view, a copy, two results and something that nobody needs."""
    x, other = tensors
    torch.zeros_like(x)
    wide = torch.cat([x, other.T])
    left, right = wide.split([2, len(wide) - 2])
    total = torch.addmm(left.new_empty(2, 2), left, x.T, beta=0, out=None)
    return [total * factor, None, torch.add(right, 1)]


def test_a_script_makes_what_its_call_makes():
    tensors = [torch.randn(2, 3), torch.randn(3, 5)]
    made = script_of(ordinary, tensors, (0.5,))
    again = [torch.randn(2, 3), torch.randn(3, 5)]
    for each in (tensors, again):
        found, expected = made.replay(None, *each), ordinary(each, 0.5)
        assert found[1] is None
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[2], expected[2])


def test_what_nobody_needs_is_not_in_it():
    made = script_of(ordinary, [torch.randn(2, 3), torch.randn(3, 5)], (0.5,))
    assert "zeros_like" not in made.source
    assert "zeros_like" not in str(list(made.replay.__globals__))


def test_what_is_made_goes_behind_its_last_use():
    made = script_of(ordinary, [torch.randn(2, 3), torch.randn(3, 5)], (0.5,))
    lines = lines_of(made.source)
    names = {line.split(" = ")[0] for line in lines if " = " in line}
    gone: set[str] = set()
    for line in lines:
        used = set(re.findall(r"\bv\d+(?:_\d+)?\b", line))
        assert not used & gone, line
        if line.startswith("del "):
            gone |= used
    returned = set(re.findall(r"\bv\d+\b", lines[-1]))
    assert len(returned) == 2
    kept_to_the_end = set(re.findall(r"\bv\d+\b", lines[-2]))  # by the last line that works
    assert names - gone <= returned | kept_to_the_end


def test_a_view_knows_its_address_in_inference_mode():
    found = []

    def look(tensors):
        found.append(tensors[0].T[1:].data_ptr() % 16)
        return []

    with torch.inference_mode():
        script_of(look, [torch.empty(7)[1:].view(2, 3)], ())
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
    """They count, log and check what is computed."""
    tensors = [torch.randn(2, 3), torch.randn(3, 5)]
    SEEN.clear()
    with mode():
        made = script_of(ordinary, tensors, (0.5,))
        assert not SEEN & {torch.cat, torch.ops.aten.cat.default}
        made.replay(None, *tensors)
    assert SEEN & {torch.cat, torch.ops.aten.cat.default}


def test_threads_may_write_tensor_maps_down_at_one_time(monkeypatch):
    """Triton's encoders are its own again when the last has gone."""
    utils = SimpleNamespace(fill_tma_descriptor=print)
    active = SimpleNamespace(utils=utils)
    driver = SimpleNamespace(driver=SimpleNamespace(active=active))
    monkeypatch.setattr(script, "triton", SimpleNamespace(runtime=driver))
    inside, go = threading.Event(), threading.Event()

    def first():
        with script._Writer([torch.empty(1)])._maps_written_down():
            inside.set()
            go.wait(10)

    def second():
        inside.wait(10)
        threading.Timer(0.2, go.set).start()
        with script._Writer([torch.empty(1)])._maps_written_down():
            threads[0].join(0.5)

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert utils.fill_tma_descriptor is print


def places(codes: list[str], **sizes: int) -> tuple[dict[str, int], int]:
    """Of buffers of these sizes, for lines that act."""
    buffers = {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
    return script._places([script._Line("", code) for code in codes], buffers)


def test_a_buffer_that_is_needed_as_a_tensor_has_its_own_memory():
    codes = ["run(at_v1, at_v2)", "add(v1, t0)", "run((at_v3, ), at_v2)", "return [v3]"]
    assert places(codes, v1=8, v2=8, v3=8) == ({"v2": 0}, 8)


@pytest.mark.parametrize("seed", range(8))
def test_no_two_buffers_are_in_one_place_at_one_time(seed):
    random = Random(seed)
    sizes = {f"v{i}": random.choice([0, 1, 500, 512, 513, 9000]) for i in range(12)}
    codes = [
        f"run({', '.join('at_' + random.choice(list(sizes)) for _ in range(3))})" for _ in range(9)
    ]
    offsets, size = places(codes, **sizes)
    used = {
        name: [i for i, code in enumerate(codes) if re.search(rf"\b{'at_' + name}\b", code)]
        for name in offsets
    }
    assert any(used.values())
    for (one, at), (two, there) in combinations(offsets.items(), 2):
        apart_in_time = used[one][-1] < used[two][0] or used[two][-1] < used[one][0]
        apart = at + sizes[one] <= there or there + sizes[two] <= at
        assert apart or apart_in_time
    assert all(at % 512 == 0 and at + sizes[name] <= size for name, at in offsets.items())
    assert size <= sum(-(-each // 512) * 512 for each in sizes.values())


def test_a_tensor_that_no_call_brings_is_a_constant():
    """A cached table, whose address a launch asks for."""
    table = torch.ones(4)

    def function(tensors):
        assert table.data_ptr()
        return [tensors[0].new_empty(4)]

    (made,) = script_of(function, [torch.zeros(4)], ()).replay(None, torch.zeros(4))
    assert made.shape == (4,)
