"""lora_grouped: the output and every gradient against the oracle, by every way it can run."""

import pytest
import torch
from experts import call, check_against_oracle, ends_of, make_experts, make_rows
from judge import USUAL_DTYPES
from memory import saved_bytes
from pairs import pairwise

import fastlora
from fastlora import blocks
from fastlora.backends import find_backend

pytestmark = pytest.mark.usefixtures("backend", "poisoned_memory")

DTYPES = USUAL_DTYPES | {
    "f16": (torch.float16, torch.float16),
    "f32-bf16": (torch.float32, torch.bfloat16),
    "f32-f64": (torch.float32, torch.float64),
}
DROPOUTS = [0.0, 0.1]
dropouts = pytest.mark.parametrize("p", DROPOUTS, ids="p{}".format)
# K, N and r that torch's grouped_mm takes, and others.
SIZES = {"aligned": (24, 16, 8), "ranks-3": (24, 16, 3), "ragged": (19, 13, 5)}
COUNTS = {
    "one": [7],
    "one-without-rows": [0],
    "even": [3, 3, 3, 3],
    "some-empty": [0, 5, 0, 0, 1, 2, 0, 9, 0],
    "all-in-one": [0, 0, 17, 0],
    "first": [17, 0, 0, 0],
    "last": [0, 0, 0, 17],
}


@pairwise({"counts": COUNTS, "n,k,r": SIZES, "name": ["f32", "bf16-f32"], "p": DROPOUTS})
def test_counts(counts, n, k, r, name, p):
    """With rows behind the last end."""
    experts = make_experts(len(counts), n, k, r, *DTYPES[name], bias=True)
    x = make_rows(sum(counts) + 4, k, DTYPES[name][0])
    check_against_oracle(x, experts, ends_of(counts), p)


@pairwise({"n,k,r": SIZES, "dtype,adapter_dtype": DTYPES, "p": DROPOUTS})
def test_dtypes(n, k, r, dtype, adapter_dtype, p):
    experts = make_experts(4, n, k, r, dtype, adapter_dtype, bias=True)
    check_against_oracle(make_rows(24, k, dtype), experts, ends_of([3, 0, 12, 5]), p)


@pairwise({"dtype,adapter_dtype": DTYPES, "p": DROPOUTS, "bias": {"": False, "bias": True}})
def test_no_rows_behind_the_last(dtype, adapter_dtype, p, bias):
    experts = make_experts(4, 24, 16, 8, dtype, adapter_dtype, bias)
    check_against_oracle(make_rows(40, 16, dtype), experts, ends_of([11, 0, 9, 20]), p)


@pairwise({"counts": {"one": [0], "three": [0, 0, 0]}, "n,k,r": SIZES, "p": DROPOUTS})
def test_no_rows_at_all(counts, n, k, r, p):
    experts = make_experts(len(counts), n, k, r, torch.float32, bias=True)
    check_against_oracle(make_rows(0, k, torch.float32), experts, ends_of(counts), p)


@pytest.mark.parametrize("r", [1, 7, 8, 40])
@dropouts
def test_ranks(r, p):
    experts = make_experts(3, 32, 24, r, torch.bfloat16, torch.float32)
    check_against_oracle(make_rows(30, 24, torch.bfloat16), experts, ends_of([9, 1, 15]), p)


@pairwise(
    {
        "name,trains": {
            "weight": ("weight", True),
            "x": ("x", False),
            "lora_a": ("lora_a", False),
            "lora_b": ("lora_b", False),
            "bias": ("bias", False),
        },
        "name_of_dtype": {name: name for name in ("f64", "f32", "bf16-f32")},
        "p": DROPOUTS,
    }
)
def test_a_tensor_that_trains_or_is_frozen(name, trains, name_of_dtype, p):
    dtype, adapter_dtype = DTYPES[name_of_dtype]
    x, experts = make_rows(20, 16, dtype), make_experts(4, 24, 16, 3, dtype, adapter_dtype, True)
    (x if name == "x" else getattr(experts, name)).requires_grad_(trains)
    check_against_oracle(x, experts, ends_of([6, 0, 5, 3]), p)


@pytest.mark.parametrize("trained", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_one_gradient_alone(trained):
    x, experts = make_rows(20, 16, torch.float32), make_experts(4, 24, 16, 3, torch.float32)
    experts = experts._replace(bias=torch.randn(4, 24))
    named = {"x": x} | experts._asdict()
    for name, tensor in named.items():
        tensor.requires_grad_(name == trained)
    check_against_oracle(x, experts, ends_of([6, 0, 5, 3]), 0.1)


STRIDES = {
    "x-transposed": {"x": lambda t: t.T.contiguous().T},
    "x-every-second-column": {"x": lambda t: t.repeat_interleave(2, 1)[:, ::2]},
    "x-from-an-odd-column": {"x": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:]},
    "x-negated": {"x": lambda t: torch._neg_view(t.repeat_interleave(2, 1)[:, ::2])},
    "x-expanded": {"x": lambda t: t[:1].expand(t.shape)},
    "weight-transposed": {"weight": lambda t: t.mT.contiguous().mT},
    "weight-every-second-column": {"weight": lambda t: t.repeat_interleave(2, 2)[..., ::2]},
    "weight-of-one-for-all": {"weight": lambda t: t[:1].expand(t.shape)},
    "adapter-transposed": {
        "lora_a": lambda t: t.mT.contiguous().mT,
        "lora_b": lambda t: t.mT.contiguous().mT,
    },
    "expert-fastest": {"lora_b": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1)},
    "bias-expanded": {"bias": lambda t: t[:1].expand(t.shape)},
}


@pairwise(
    {"changes": STRIDES, "dtype": {"f32": torch.float32, "bf16": torch.bfloat16}, "p": DROPOUTS}
)
def test_strides(changes, dtype, p):
    x, experts = make_rows(20, 16, dtype), make_experts(4, 24, 16, 8, dtype, bias=True)
    for name, change in changes.items():
        tensor = x if name == "x" else getattr(experts, name)
        changed = change(tensor.detach()).requires_grad_(tensor.requires_grad)
        assert changed.shape == tensor.shape
        assert changed.stride() != tensor.stride()
        x, experts = (changed, experts) if name == "x" else (x, experts._replace(**{name: changed}))
    check_against_oracle(x, experts, ends_of([6, 0, 5, 3]), p)


def test_strides_of_offsets():
    experts = make_experts(3, 24, 16, 8, torch.float32, bias=True)
    offsets = ends_of([4, 0, 5]).repeat_interleave(2)[::2]
    assert not offsets.is_contiguous()
    check_against_oracle(make_rows(11, 16, torch.float32), experts, offsets)


DYS = {
    "expanded": lambda y: torch.randn((), dtype=y.dtype, device=y.device).expand(y.shape),
    "expanded-rows": lambda y: torch.randn_like(y[:1]).expand(y.shape),
    "expanded-columns": lambda y: torch.randn_like(y[:, :1]).expand(y.shape),
    "transposed": lambda y: torch.randn_like(y.T).T,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("make_dy", DYS.values(), ids=DYS)
def test_strides_of_dy(make_dy, dtype):
    experts = make_experts(4, 24, 16, 8, dtype, bias=True)
    experts.weight.requires_grad_()
    offsets = ends_of([6, 0, 5, 3])
    check_against_oracle(make_rows(17, 16, dtype), experts, offsets, make_dy=make_dy)


@dropouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_what_nobody_s_rows_hold_changes_nothing(dtype, p):
    experts = make_experts(3, 24, 16, 8, dtype, torch.float32, bias=True)
    experts.weight.requires_grad_()
    leaves, found = [tensor for tensor in experts if tensor.requires_grad], []
    for value in (0.0, torch.nan, torch.inf):
        torch.manual_seed(1)
        x, dy = torch.randn(14, 16).to(dtype), torch.randn(14, 24).to(dtype)
        x[9:], dy[9:] = value, value
        y = call(x.requires_grad_(), experts, ends_of([4, 0, 5]), dropout=p)
        dx, *gradients = torch.autograd.grad(y, [x, *leaves], dy)
        assert not y[9:].any()
        assert not dx[9:].any()
        found.append([y, dx, *gradients])
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_dropout_over_many_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 64)
    experts = make_experts(3, 24, 16, 8, torch.bfloat16, torch.float32)
    check_against_oracle(make_rows(50, 16, torch.bfloat16), experts, ends_of([20, 3, 19]), 0.3)


@pytest.mark.usefixtures("wide")
@pairwise({"n,k,r": SIZES, "dtype": {"f16": torch.float16, "bf16": torch.bfloat16}, "p": DROPOUTS})
def test_on_a_cpu_that_multiplies_16_bits_slowly(n, k, r, dtype, p):
    experts = make_experts(4, n, k, r, dtype, torch.float32, bias=True)
    experts.weight.requires_grad_()
    check_against_oracle(make_rows(20, k, dtype), experts, ends_of([1, 0, 9, 7]), p)


@dropouts
@pytest.mark.parametrize("k", [5, 8])
def test_gradcheck(p, k):
    experts = make_experts(3, 4, k, 2, torch.float64, bias=True)
    experts.weight.requires_grad_()
    offsets = ends_of([2, 0, 3])

    def run(x, weight, lora_a, lora_b, bias):
        torch.manual_seed(3)  # the same mask for every evaluation
        options = {"bias": bias, "scale": 0.6, "dropout": p}
        return fastlora.lora_grouped(x, weight, lora_a, lora_b, offsets, **options)

    inputs = (make_rows(6, k, torch.float64), *experts)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(run, inputs)


@dropouts
def test_gradients_for_many_dys_at_once(p):
    x, experts = make_rows(10, 8, torch.float32), make_experts(3, 8, 8, 2, torch.float32)
    leaves = [x, experts.lora_a, experts.lora_b]
    y = call(x, experts, ends_of([4, 0, 5]), dropout=p)
    dys = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for i, gradient in enumerate(batched):
        torch.testing.assert_close(gradient, torch.stack([each[i] for each in single]))


def test_a_gradient_of_dx_where_x_is_not_kept_is_an_error():
    """It is not where lora_a and weight are frozen, and the gradient of lora_b reads it."""
    x, experts = make_rows(10, 8, torch.float32), make_experts(3, 8, 8, 2, torch.float32)
    experts.lora_a.requires_grad_(False)
    y = call(x, experts, ends_of([4, 0, 5]))
    with pytest.raises(NotImplementedError, match="let lora_a require gradients"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@dropouts
def test_same_inputs_same_bits(p):
    x = make_rows(40, 32, torch.bfloat16)
    experts = make_experts(5, 24, 32, 4, torch.bfloat16, torch.float32)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        y = call(x, experts, ends_of([7, 0, 20, 1, 9]), dropout=p)
        results.append((y, *torch.autograd.grad(y.sum(), (x, experts.lora_a, experts.lora_b))))
    assert all(map(torch.equal, *results))


@dropouts
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_keeps_x_h_and_offsets_only(p, adapter_dtype):
    x = make_rows(64, 128, torch.bfloat16)
    experts = make_experts(4, 32, 128, 8, torch.bfloat16, adapter_dtype, bias=True)
    offsets = ends_of([20, 0, 30, 14])
    storages = saved_bytes(
        lambda: call(x, experts, offsets, dropout=p), apart_from=[x, *experts, offsets]
    )
    of_h = find_backend().h_dtype(x.dtype, x.device).itemsize
    assert sum(storages.values()) == 64 * 8 * of_h + (8 if p else 0)


def test_keeps_no_x_where_nobody_reads_it():
    x = make_rows(64, 128, torch.float32)
    experts = make_experts(4, 32, 128, 8, torch.float32)
    experts.lora_a.requires_grad_(False)
    given = [*experts[:3], ends_of([20, 0, 30, 14])]
    kept = saved_bytes(lambda: fastlora.lora_grouped(x, *given), apart_from=given)
    assert sum(kept.values()) == 64 * 8 * 4


def test_saved_tensors_are_not_written_over():
    x, experts = make_rows(16, 16, torch.float32), make_experts(3, 8, 16, 4, torch.float32)
    given = [x, *experts[:3], ends_of([4, 5, 6])]
    before = [tensor.clone() for tensor in given]
    y = fastlora.lora_grouped(*given, dropout=0.3)
    leaves = (x, experts.lora_a, experts.lora_b)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), leaves)))
    assert all(map(torch.equal, before, given))


def test_output_may_be_changed_in_place():
    x, experts = make_rows(9, 8, torch.float32), make_experts(2, 8, 8, 2, torch.float32)
    offsets = ends_of([4, 5])
    y = call(x, experts, offsets)
    y += 1
    y.mul_(2)
    torch.testing.assert_close(y, 2 * call(x, experts, offsets) + 2)
    (changed,) = torch.autograd.grad(y.sum(), experts.lora_b)
    (plain,) = torch.autograd.grad(2 * call(x, experts, offsets).sum(), experts.lora_b)
    torch.testing.assert_close(changed, plain)


def test_dropout_only_while_training():
    x, experts = make_rows(9, 8, torch.float32), make_experts(2, 8, 8, 2, torch.float32)
    still = call(x, experts, ends_of([4, 5]), dropout=0.5, training=False)
    assert torch.equal(still, call(x, experts, ends_of([4, 5])))


def test_no_gradient_mode_keeps_no_graph():
    x, experts = make_rows(9, 8, torch.float32), make_experts(2, 8, 8, 2, torch.float32)
    with torch.no_grad():
        assert not call(x, experts, ends_of([4, 5])).requires_grad
    with torch.inference_mode():
        assert call(x, experts, ends_of([4, 5])).is_inference()


@dropouts
def test_one_expert_is_lora_linear(p):
    x, experts = make_rows(9, 16, torch.float32), make_experts(1, 24, 16, 4, torch.float32)
    ys = []
    for run in (
        lambda: call(x, experts, ends_of([9]), dropout=p, scale=0.5),
        lambda: fastlora.lora_linear(x, *[t[0] for t in experts[:3]], dropout=p, scale=0.5),
    ):
        torch.manual_seed(2)
        ys.append(run())
    torch.testing.assert_close(*ys)
