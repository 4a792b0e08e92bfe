"""multi_lora_linear: y and every gradient against a loop of single-adapter calls in float64."""

import pytest
import torch
from judge import USUAL_DTYPES
from memory import saved_bytes
from multi import call, check_against_oracle, gradients, leaves_of, make_adapters, rows_of
from packed import random_int8

import fastlora
from fastlora import AdapterMapping
from fastlora import rows as cut_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

dtypes = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), USUAL_DTYPES.values(), ids=USUAL_DTYPES
)
DROPOUTS = {"": None, "dropouts": [0.1, 0.0, 0.5]}
dropouts = pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
kinds = pytest.mark.parametrize("banks", [True, False], ids=["banks", "lists"])
# The indices, and x's shape without its features.  Adapter 1 may have no rows.
BATCHES = {
    "rows-in-runs": ([0, 0, 0, -1, 2, 2, 2, 2], (8,)),
    "rows-mixed": ([2, 0, -1, 1, 0, 2, -1, 0], (8,)),
    "sequences": ([2, -1, 0, 2], (4, 3)),
    "rows-of-sequences": ([[0, 2, 2], [1, -1, 0], [0, 0, 0]], (3, 3)),
    "three-dims": ([[2, -1], [0, 0]], (2, 2, 3)),
    "nobody": ([-1, -1, -1], (3, 2)),
    "all-one's": ([1, 1, 1], (3, 2)),
    "a-row": ([2], (1,)),
    "no-rows": ([], (0, 5)),
    "empty-sequences": ([0, 1], (2, 0)),
}
batches = pytest.mark.parametrize(("indices", "shape"), BATCHES.values(), ids=BATCHES)


def make_x(shape, k: int = 12, dtype=torch.float64):
    return torch.randn(*shape, k, dtype=torch.float64).to(dtype).requires_grad_()


def int32(indices) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32)


@kinds
@dropouts
@batches
def test_batches(indices, shape, dropouts, banks):
    adapters = make_adapters([2, 5, 3], 10, 12, torch.float64, banks=banks)
    check_against_oracle(make_x(shape), adapters, int32(indices), dropouts)


@dtypes
@dropouts
@pytest.mark.parametrize("name", ["rows-mixed", "sequences"])
def test_dtypes(name, dropouts, dtype, adapter_dtype):
    indices, shape = BATCHES[name]
    adapters = make_adapters([2, 5, 3], 10, 12, dtype, adapter_dtype)
    check_against_oracle(make_x(shape, dtype=dtype), adapters, int32(indices), dropouts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@dropouts
@pytest.mark.parametrize("name", ["rows-mixed", "sequences", "a-row"])
def test_where_a_cpu_multiplies_16_bits_slowly(name, dropouts, dtype, wide):
    indices, shape = BATCHES[name]
    adapters = make_adapters([2, 5, 3], 10, 12, dtype, torch.float32)
    check_against_oracle(make_x(shape, dtype=dtype), adapters, int32(indices), dropouts)


@pytest.mark.parametrize("n", [1, 3, 64])
@kinds
def test_numbers_and_ranks_of_adapters(n, banks):
    """Ranks 1 to 128 in one call; some adapters have no rows; dropout is on."""
    ranks = [(1, 128, 7, 16, 3)[i % 5] for i in range(n)]
    adapters = make_adapters(ranks, 10, 12, torch.float64, banks=banks)
    indices = torch.randint(-1, n, (2 * n,)).to(torch.int32)
    check_against_oracle(make_x((2 * n, 2)), adapters, indices, [0.1] * n)


def test_dropout_goes_block_by_block(monkeypatch):
    monkeypatch.setattr("fastlora.blocks._CPU_BLOCK", 40)
    adapters = make_adapters([4, 2, 3], 9, 12, torch.float32)
    indices = torch.randint(-1, 3, (60,)).to(torch.int32)
    check_against_oracle(make_x((60,), dtype=torch.float32), adapters, indices, [0.1, 0.2, 0.0])


@pytest.mark.parametrize("frozen", ["x", "lora_a", "lora_b", "bias", "lora_a1 lora_b1"])
@dropouts
def test_what_is_frozen_gets_no_gradient(frozen, dropouts):
    adapters = make_adapters([2, 5, 3], 10, 12, torch.float64, banks=False)
    x = make_x((8,))
    for name, tensor in ({"x": x} | leaves_of(adapters)).items():
        tensor.requires_grad_(not any(name.startswith(part) for part in frozen.split()))
    check_against_oracle(x, adapters, int32(BATCHES["rows-mixed"][0]), dropouts)


def test_a_weight_that_trains():
    adapters = make_adapters([2, 5, 3], 10, 12, torch.float64)
    adapters.weight.requires_grad_()
    check_against_oracle(make_x((8,)), adapters, int32(BATCHES["rows-mixed"][0]))


@pytest.mark.parametrize("trains", [[0], [2], []], ids=str)
def test_only_some_adapters_train(trains):
    """All others are frozen, x too."""
    adapters = make_adapters([2, 5, 3], 10, 12, torch.float64, banks=False, bias=False)
    for i in range(3):
        adapters.lora_a[i].requires_grad_(i in trains)
        adapters.lora_b[i].requires_grad_(i in trains)
    y = call(make_x((8,)).detach(), adapters, int32(BATCHES["rows-mixed"][0]))
    assert y.requires_grad == bool(trains)
    if trains:
        check_against_oracle(
            make_x((8,)).detach(), adapters, int32(BATCHES["rows-mixed"][0]), [0.3, 0.0, 0.3]
        )


def test_a_weight_that_is_packed():
    packed = random_int8(10, 12)
    x, adapters = make_x((8,), dtype=torch.float32), make_adapters([2, 5, 3], 10, 12, torch.float32)
    indices, found = int32(BATCHES["rows-mixed"][0]), []
    for weight in (packed, packed.dense(torch.float32)):
        y = call(x, adapters._replace(weight=weight), indices)
        found.append([y, *gradients(y, torch.ones_like(y), x, adapters).values()])
    torch.testing.assert_close(*found)


STRIDES = {
    "x-transposed": ("x", lambda t: t.T.contiguous().T),
    "x-every-second-column": ("x", lambda t: t.repeat_interleave(2, 1)[:, ::2]),
    "x-expanded": ("x", lambda t: t[:1].expand(t.shape)),
    "weight-transposed": ("weight", lambda t: t.T.contiguous().T),
    "banks-transposed": ("lora_a", lambda t: t.mT.contiguous().mT),
    "adapter-fastest": ("lora_b", lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
}


@pytest.mark.parametrize(("name", "change"), STRIDES.values(), ids=STRIDES)
@dropouts
def test_strides(name, change, dropouts):
    x, adapters = make_x((8,)), make_adapters([2, 5, 3], 10, 12, torch.float64)
    if name == "x":
        x = change(x.detach()).requires_grad_()
    else:
        tensor = getattr(adapters, name)
        changed = change(tensor.detach()).requires_grad_(tensor.requires_grad)
        adapters = adapters._replace(**{name: changed})
    check_against_oracle(x, adapters, int32(BATCHES["rows-mixed"][0]), dropouts)


def test_a_bank_has_zeros_where_nothing_was_read():
    """Behind the ranks, and for adapters without rows, whose values may be NaN."""
    adapters = make_adapters([2, 5, 3], 10, 12, torch.float32)
    with torch.no_grad():
        adapters.lora_a[1], adapters.lora_b[1] = torch.nan, torch.nan
    y = call(make_x((4, 3), dtype=torch.float32), adapters, int32([2, -1, 0, 2]))
    d_lora_a, d_lora_b = torch.autograd.grad(y.sum(), [adapters.lora_a, adapters.lora_b])
    assert y.isfinite().all()
    assert not d_lora_a[1].any()
    assert not d_lora_a[0, 2:].any()
    assert not d_lora_a[2, 3:].any()
    assert not d_lora_b[1].any()
    assert not d_lora_b[0, :, 2:].any()
    assert not d_lora_b[2, :, 3:].any()
    assert d_lora_a[0, :2].all()
    assert d_lora_b[2, :, :3].all()


def test_an_adapter_of_a_list_without_rows_gets_no_gradient():
    adapters = make_adapters([2, 5, 3], 10, 12, torch.float32, banks=False)
    call(make_x((2,), dtype=torch.float32), adapters, int32([2, 2])).sum().backward()
    assert [tensor.grad is None for tensor in adapters.lora_a] == [True, True, False]


def test_what_else_is_in_the_batch_changes_no_bit():
    """Rows, masks and gradients of an adapter are those of a batch of its own."""
    adapters = make_adapters([4, 4, 4], 10, 12, torch.float32, banks=False, bias=False)
    x = make_x((6, 4), dtype=torch.float32).detach()
    indices = int32([2, 0, 0, -1, 2, 1])
    found = []
    for rows in (slice(None), indices == 2):
        torch.manual_seed(3)
        y = call(x[rows], adapters, indices[rows], dropout=0.3)
        d_lora_a, d_lora_b = torch.autograd.grad(
            y.square().sum(), [adapters.lora_a[2], adapters.lora_b[2]]
        )
        found.append((y[indices[rows] == 2], d_lora_a, d_lora_b))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_the_same_bits_each_time():
    adapters = make_adapters([4, 3, 4], 10, 12, torch.float32)
    x, indices = make_x((40,), dtype=torch.float32), torch.randint(-1, 3, (40,)).to(torch.int32)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        y = call(x, adapters, indices, dropout=0.3)
        found.append([y, *gradients(y, y.detach(), x, adapters).values()])
    assert all(map(torch.equal, *found))


def test_it_keeps_x_and_h_and_seeds():
    adapters = make_adapters([4, 3, 4], 10, 12, torch.float32)
    x, indices = make_x((40,), dtype=torch.float32), torch.randint(-1, 3, (40,)).to(torch.int32)
    mapping_of = AdapterMapping(indices, 3)
    own = [x, adapters.weight, adapters.lora_a, adapters.lora_b, adapters.bias]
    kept = saved_bytes(lambda: call(x, adapters, mapping_of, dropout=0.3), own)
    assert sorted(kept.values()) == [3 * 8, 40 * 4 * 4]
    for tensor in (adapters.lora_a, adapters.lora_b):
        tensor.requires_grad_(False)
    own.remove(x)
    kept = saved_bytes(lambda: call(x, adapters, mapping_of), own)
    assert not kept  # not even x


def test_layers_share_what_was_sorted_once(monkeypatch):
    sorted_times = []
    sort = cut_rows.sort_items

    def counted(*arguments):
        sorted_times.append(arguments)
        return sort(*arguments)

    monkeypatch.setattr(cut_rows, "sort_items", counted)
    adapters = make_adapters([2, 5, 3], 12, 12, torch.float32)
    indices = int32([2, 0, -1, 0])
    shared, x = AdapterMapping(indices, 3), make_x((4, 2), dtype=torch.float32)
    expected = call(call(x, adapters, indices), adapters, indices)
    sorted_times.clear()
    indices.fill_(0)  # which changes a mapping no more
    y = call(call(x, adapters, shared), adapters, shared)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert not sorted_times


def test_rows_that_lie_together_are_not_copied(monkeypatch):
    from fastlora.backends import torch as backend

    places = []
    run = backend.forward_rows

    def noted(x, outputs, masks, into):
        places.append((into[0].untyped_storage().data_ptr(), x.untyped_storage().data_ptr()))
        return run(x, outputs, masks, into)

    monkeypatch.setattr(backend, "forward_rows", noted)
    adapters = make_adapters([2, 5, 3], 10, 12, torch.float32)
    x = make_x((5, 2), dtype=torch.float32)
    y = call(x, adapters, int32([1, 1, 0, 2, 2]))
    own = (y.untyped_storage().data_ptr(), x.untyped_storage().data_ptr())
    assert places == [own] * 4  # the base, and three adapters


def test_evaluation_drops_nothing():
    adapters, indices = make_adapters([2, 5, 3], 10, 12, torch.float32), int32([0, 1, 2])
    x = make_x((3,), dtype=torch.float32)
    plain = call(x, adapters, indices)
    assert torch.equal(call(x, adapters, indices, dropout=0.5, training=False), plain)
    assert not torch.equal(call(x, adapters, indices, dropout=0.5), plain)


def test_numbers_as_tensors_are_those_of_lists():
    adapters, indices = make_adapters([2, 5, 3], 10, 12, torch.float32), int32([0, 1, 2])
    x = make_x((3,), dtype=torch.float32)
    as_tensors = {"scales": torch.tensor(adapters.scales), "ranks": torch.tensor(adapters.ranks)}
    assert torch.equal(call(x, adapters, indices, **as_tensors), call(x, adapters, indices))


def test_one_adapter_is_lora_linear():
    x, adapters = make_x((7,), dtype=torch.float32), make_adapters([3], 10, 12, torch.float32)
    y = call(x, adapters, int32([0] * 7))
    weight, bias, (lora_a,), (lora_b,), (scale,), _ = adapters
    expected = fastlora.lora_linear(x, weight, lora_a, lora_b, bias=bias, scale=scale)
    torch.testing.assert_close(y, expected)
    assert rows_of(int32([0] * 7), x, 1) == [7]
