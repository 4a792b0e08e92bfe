"""Layers with 8-bit products on the Triton backend: the oracle's numbers, and uncovered calls."""

from collections.abc import Callable
from dataclasses import replace

import int8
import pytest
import torch
from int8_products import lora_linears, over
from judge import check, make_projection
from kernel_cases import BF16, F16, F32, recorded
from marks import DEVICE, pairwise
from torch import Tensor

import fastlora
from fastlora.backends.dropout import dropout_mask
from fastlora.backends.triton import supported
from fastlora.call.projection import Adapter, Base, Output, flatten, layouts_of, unflatten
from fastlora.formats.format import Quantized
from fastlora.formats.packing import pack_weight
from fastlora.formats.rotated_int8 import LONGEST_SUM, RotatedInt8, pack_rotated
from fastlora.kernels import replay
from fastlora.kernels.target import target_of, use_target
from fastlora.ops.node import draw_seed

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="its truth is computed on a CPU")

DTYPES = {"bf16": (BF16, BF16), "bf16-f32": (BF16, F32), "f16-f32": (F16, F32), "f32": (F32, F32)}
# (features, ranks, whether it has a bias, whether its weight is packed) of each output
GROUPS = {
    "one": [(33, (3,), True, True)],
    "aligned": [(64, (16,), False, True)],
    "frozen": [(40, (), True, True)],
    "three": [(64, (8,), False, True), (33, (70,), True, True), (20, (), False, True)],
    "two-adapters": [(48, (4, 17), False, True)],
    "with-dense": [(48, (4,), True, True), (20, (3,), False, False), (24, (), False, False)],
    "six": [(32, (2,), False, True)] * 6,
}


def group(k: int, outs: list[tuple], dtypes: tuple = (BF16, F32)) -> list[Output]:
    outputs = []
    for n, ranks, has_bias, is_packed in outs:
        made = [make_projection(n, k, r, *dtypes, bias=has_bias) for r in ranks or (1,)]
        weight = pack_rotated(torch.randn(n, k)) if is_packed else made[0].weight
        adapters = [Adapter(one.lora_a, one.lora_b, 0.5) for one in made[: len(ranks)]]
        outputs.append(Output(Base(weight, made[0].bias), tuple(adapters)))
    return outputs


def check_group(x: Tensor, outputs: list[Output], p: float = 0.0) -> dict[str, Tensor]:
    """Every output and gradient of the Triton backend, with exact integer sums as the truth."""
    weights = [output.base.weight for output in outputs]
    is_packed = [isinstance(weight, Quantized) for weight in weights]
    pairs = zip(weights, is_packed, strict=True)
    dense = over([w.dense(x.dtype) if packed else w for w, packed in pairs], outputs)
    layouts = layouts_of(dense)
    leaves = {"x": x} | {str(i): each for i, each in enumerate(flatten(dense, layouts))}
    masks = None
    if p:
        torch.manual_seed(5)
        seeds = draw_seed(sum(len(o.adapters) for o in outputs), x.device)
        masks = [dropout_mask(seed.view(1), tuple(x.shape), p) for seed in seeds]

    def textbook(t: dict) -> tuple:
        x, *flat = t.values()
        own = unflatten(flat, layouts)
        each = zip(weights, is_packed, own, strict=True)
        its = over([weight if packed else o.base.weight for weight, packed, o in each], own)
        return lora_linears(x, its, dropout=p, masks=masks)

    def run() -> tuple:
        torch.manual_seed(5)
        return fastlora.lora_linears(x, outputs, dropout=p, backend="triton")

    return check(run, textbook, leaves)


def exact(m: int, k: int, dtype: torch.dtype = BF16, trains: bool = True) -> Tensor:
    return int8.exact(m, k, dtype=dtype).requires_grad_(trains)


@pairwise(
    {
        "name": {name: name for name in GROUPS},
        "dtypes": DTYPES,
        "size": {"one-row": (1, 72), "ragged": (37, 75), "aligned": (40, 128)},
        "dropout": [0.0, 0.3],
    }
)
def test_every_output_and_gradient(name, dtypes, size, dropout):
    outputs = group(size[1], GROUPS[name], dtypes)
    has_adapters = any(output.adapters for output in outputs)
    check_group(exact(*size, dtypes[0]), outputs, dropout if has_adapters else 0.0)


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "turned"])
def test_the_launches_and_whether_dx_reads_transposed_codes(turned):
    x, outputs = exact(37, 75), group(75, GROUPS["three"])
    arch = 80 if turned else 90
    target = replace(target_of(x.device), kind="cuda", arch=arch)
    assert target.turns_int8 is turned
    replay.calls.clear()
    with use_target(target), recorded() as records:
        check_group(x, outputs, 0.2)
    y, *_, dx = [each for each in records if each.name == "gemm_int8_lowrank"]
    assert y.arguments["Q_TRANSPOSED"]
    assert dx.arguments["Q_TRANSPOSED"] is turned
    # One launch rounds x, and one rounds each dy.  No other kernel runs.
    rounding = [each for each in records if each.name == "quantize_rows"]
    assert len(rounding) == 1 + len(outputs)
    names = {
        "project",
        "quantize_rows",
        "gemm_int8_lowrank",
        "gemm_lowrank",
        "weight_grad",
        "sum_planes",
    }
    assert {each.name for each in records} <= names


@pytest.mark.parametrize("trains", ["x", "ab", "a", "b"])
def test_only_the_gradients_that_are_asked_for(trains):
    x, outputs = exact(37, 75, trains="x" in trains), group(75, GROUPS["one"])
    ((base, (adapter,)),) = outputs
    a, b = (each.detach().requires_grad_("ab"[i] in trains) for i, each in enumerate(adapter[:2]))
    check_group(x, [Output(Base(base.weight, base.bias.detach()), (Adapter(a, b, 0.5),))])


def test_calls_that_no_kernel_covers_give_a_reason():
    device, weight = torch.device("cpu"), pack_rotated(torch.randn(16, 64))
    why = lambda weight: supported.why_not(BF16, device, [Output(Base(weight))])  # noqa: E731
    assert why(weight) == ""
    long = Quantized(RotatedInt8(1, LONGEST_SUM + 1, "float32"), weight.tensors)
    assert "133000 products" in why(long)


def linear(x: Tensor) -> Callable:
    """A call with 8-bit products."""
    outputs = group(64, GROUPS["one"])
    return lambda backend: fastlora.lora_linears(x, outputs, backend=backend)[0]


def experts(x: Tensor) -> Callable:
    """A call of experts with 8-bit weights."""
    weight = pack_weight(torch.randn(2, 16, 64), "int8")
    tensors = weight, torch.randn(2, 3, 64), torch.randn(2, 16, 3)
    ends = torch.tensor([9, 20], dtype=torch.int32)
    return lambda backend: fastlora.grouped_lora_linear(x, *tensors, ends, backend=backend)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(linear, "no int8"), (experts, "the Triton kernels have no 8-bit products of experts")],
)
def test_an_uncovered_call_runs_on_torch_with_a_warning(monkeypatch, make, reason):
    """As torch computes it, bit for bit."""
    monkeypatch.setattr(supported, "_said", set())
    x = exact(20, 64, trains=False)
    call = make(x)
    replay.calls.clear()
    with use_target(replace(target_of(x.device), arch=103)), pytest.warns(match=reason):
        found = call("triton")
    assert torch.equal(found, call("torch"))


def test_many_adapters_share_a_base_of_8_bits():
    """The base product is a frozen layer's."""
    weight, pair = pack_rotated(torch.randn(48, 72)), (torch.randn(3, 72), torch.randn(48, 3))
    x, indices = exact(20, 72, F32), torch.arange(20) % 3 - 1
    lists, found = [[each] * 2 for each in pair], []
    for backend in ("triton", "torch"):
        with fastlora.use_backend(backend), recorded() as records:
            y = fastlora.multi_lora_linear(x, weight, *lists, indices, scales=[0.5, 2.0])
            found.append([y, *torch.autograd.grad(y.sum(), x)])
        names = {each.name for each in records}
        assert ("quantize_rows" in names) is (backend == "triton")
    for ours, its in zip(*found, strict=True):
        largest = float(its.detach().abs().max())
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-4 * largest)
