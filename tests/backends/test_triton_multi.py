"""Many adapters by the Triton kernels: y and every gradient against a loop in float64."""

import pytest
import torch
from device import DEVICE
from memory import saved_bytes
from multi import call, check_against_oracle, make_adapters
from packed import random_int8
from pairs import pairwise

import fastlora
from fastlora import AdapterMapping
from fastlora.kernels.launch import recorded

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BF16, F32 = torch.bfloat16, torch.float32
# The indices, and x's shape without its features.
BATCHES = {
    "in-runs": ([0] * 35 + [2] * 5, (40,)),
    "runs-in-the-middle": ([-1, 0, 0, 2, -1, -1], (6, 7)),
    "mixed": ([2, 0, -1, 1, 0, 2, -1, 0] * 9, (72,)),
    "mixed-sequences": ([2, -1, 0, 2], (4, 5)),
    "nobody": ([-1, -1], (2, 3)),
    "one": ([1], (1, 40)),
    "no-rows": ([], (0,)),
}


@pytest.fixture(autouse=True)
def by_triton():
    place = torch.device(DEVICE)
    with fastlora.use_backend("triton"), place:
        yield


def int32(indices) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32)


def make_x(shape, k: int = 36, dtype=F32) -> torch.Tensor:
    return torch.randn(*shape, k).to(dtype).requires_grad_()


@pairwise(
    {
        "batch": BATCHES,
        "dropouts": {"": None, "dropout": [0.1, 0.0, 0.5]},
        "banks": {"banks": True, "lists": False},
        "dtype,own": {"f32": (F32, F32), "bf16": (BF16, BF16), "bf16-f32": (BF16, F32)},
        "ranks": {"unlike": [2, 20, 3], "alike": [4, 4, 4]},
    }
)
def test_batches(batch, dropouts, banks, dtype, own, ranks):
    indices, shape = batch
    adapters = make_adapters(ranks, 70, 36, dtype, own, banks=banks)
    check_against_oracle(make_x(shape, dtype=dtype), adapters, int32(indices), dropouts)


@pytest.mark.parametrize("frozen", ["x", "x lora_b", "lora_a", "lora_b", "bias lora_a1 lora_b1"])
def test_what_is_frozen_gets_no_gradient(frozen):
    adapters = make_adapters([2, 5, 3], 10, 12, F32, banks="1" not in frozen)
    x = make_x((72,), 12)
    names = {"x": x, "bias": adapters.bias, "lora_a": adapters.lora_a, "lora_b": adapters.lora_b}
    names |= {f"{name}1": names[name][1] for name in ("lora_a", "lora_b")}
    for name in frozen.split():
        names[name].requires_grad_(False)
    check_against_oracle(x, adapters, int32(BATCHES["mixed"][0]), [0.2, 0.2, 0.0])


@pytest.mark.parametrize("adapters", [6, 64])
def test_many_adapters_of_which_some_have_no_rows(adapters):
    ranks = [(1, 40, 7)[i % 3] for i in range(adapters)]
    made = make_adapters(ranks, 10, 12, F32, banks=False)
    indices = torch.randint(-1, adapters, (2 * adapters,), dtype=torch.int32)
    check_against_oracle(make_x((2 * adapters, 2), 12), made, indices, [0.1] * adapters)


STRIDES = {
    "x-transposed": ("x", lambda t: t.T.contiguous().T),
    "x-every-second-column": ("x", lambda t: t.repeat_interleave(2, 1)[:, ::2]),
    "banks-transposed": ("lora_a", lambda t: t.mT.contiguous().mT),
    "adapter-fastest": ("lora_b", lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
}


@pytest.mark.parametrize(("name", "change"), STRIDES.values(), ids=STRIDES)
def test_strides(name, change):
    x, adapters = make_x((8,), 12), make_adapters([4, 4, 4], 10, 12, F32)
    if name == "x":
        x = change(x.detach()).requires_grad_()
    else:
        changed = change(getattr(adapters, name).detach()).requires_grad_()
        adapters = adapters._replace(**{name: changed})
    check_against_oracle(x, adapters, int32([2, 0, -1, 1, 0, 2, -1, 0]), [0.1, 0.0, 0.5])


def test_adapters_of_unlike_dtypes():
    adapters = make_adapters([3, 3], 10, 12, BF16, banks=False)
    for tensors in (adapters.lora_a, adapters.lora_b):
        tensors[1] = tensors[1].detach().float().requires_grad_()
    check_against_oracle(make_x((6,), 12, BF16), adapters, int32([1, 0, 0, 1, -1, 1]))


def test_a_packed_base():
    packed, x = random_int8(10, 12), make_x((8,), 12)
    adapters = make_adapters([2, 5, 3], 10, 12, F32)
    found = []
    for weight in (packed, packed.dense(F32)):
        y = call(x, adapters._replace(weight=weight), int32([2, 0, -1, 1, 0, 2, -1, 0]))
        found.append([y, *torch.autograd.grad(y.sum(), [x, adapters.lora_a, adapters.lora_b])])
    torch.testing.assert_close(*found)


def test_a_bank_is_read_where_it_lies_and_no_row_is_gathered():
    adapters, mapping = make_adapters([4, 4], 64, 48, F32), AdapterMapping([1, -1, 0, 1], 2)
    x = make_x((4, 8), 48)
    own = {t.untyped_storage().data_ptr() for t in (x, adapters.lora_a, adapters.lora_b)}
    with recorded() as launches:
        y = call(x, adapters, mapping)
        y.sum().backward()
    operands = [launch.arguments.get(name) for launch in launches for name in ("x", "v")]
    tensors = [t for each in operands for t in (each if isinstance(each, tuple) else (each,))]
    read = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    assert len(launches) >= 5
    assert own <= read


def test_it_keeps_x_and_h_and_seeds():
    adapters, x = make_adapters([4, 3, 4], 10, 12, F32), make_x((40,), 12)
    mapping = AdapterMapping([0, 2, 0, -1] * 10, 3)
    own = [x, adapters.weight, adapters.lora_a, adapters.lora_b, adapters.bias]
    kept = saved_bytes(lambda: call(x, adapters, mapping, dropout=0.3), own)
    assert sorted(kept.values()) == [3 * 8, 40 * 4 * 4]


def test_a_compiled_call_is_the_same():
    adapters = make_adapters([2, 5, 3], 10, 12, F32, banks=False)
    x, indices = make_x((8,), 12), int32([2, 0, -1, 0, 0, 2, -1, 0])
    leaves = [x, *adapters.lora_a, *adapters.lora_b]

    def run(function):
        y = function(x, adapters, indices)
        found = torch.autograd.grad(
            y.square().sum(), leaves, allow_unused=True, materialize_grads=True
        )
        return [y, *found]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(call), rtol=0, atol=0)
