"""What the launchers state about their work is what they do: counted in Triton's interpreter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from counting import Counted, counted_launches
from device import DEVICE
from judge import make_projection
from memory import saved_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.kernels.config import GemmConfig
from fastlora.kernels.gemm_lowrank import gemm_lowrank
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.project import project
from fastlora.kernels.sum_planes import sum_planes
from fastlora.kernels.weight_grad import weight_grad

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="bytes are counted in the interpreter")

BF16, F32 = torch.bfloat16, torch.float32
DESCRIPTORS = GemmConfig(32, 32, 16, warps=4, stages=2, group=2, descriptors=True)
POINTERS = GemmConfig(32, 32, 16, warps=4, stages=2, group=2)


@dataclass
class Call:
    """A launcher's call, its formula in torch, and the tensors that come in or are asked for."""

    run: Callable[[], Sequence[Tensor]]
    formula: Callable[[], object]
    tensors: list[Tensor]


def project_call(M, K, ranks, *, dropout=0.0, dtype=BF16, adapter_dtype=F32) -> Call:
    x = torch.randn(M, K).to(dtype)
    adapters = [torch.randn(r, K).to(adapter_dtype).T for r in ranks]
    seeds = torch.arange(len(ranks)) if dropout else None
    factors = [1.0] * len(ranks)
    return Call(
        lambda: project(x, adapters, factors, precision="ieee", dropout=dropout, seeds=seeds),
        lambda: [x @ a.to(dtype) for a in adapters],
        [x, *adapters, *([] if seeds is None else [seeds])],
    )


def gemm_call(
    M,
    N,
    depths,
    ranks,
    config=DESCRIPTORS,
    *,
    dx=False,
    bias=False,
    add=False,
    dropout=0.0,
    makes_u=False,
) -> Call:
    """y, or dx with the weights in their other orientation; one projection for every rank."""
    ps = [torch.randn(M, K).to(BF16) for K in depths]
    qs = [torch.randn(K, N).to(BF16) if dx else torch.randn(N, K).to(BF16).T for K in depths]
    us = [torch.randn(M, r).to(BF16) for r in ranks]
    vs = [torch.randn(r, N) if dx else torch.randn(N, r).T for r in ranks]
    out = torch.randn(M, N).to(BF16)
    b_bias = torch.randn(N) if bias else None
    seeds = torch.arange(len(ranks)) if dropout else None
    a = torch.randn(depths[0], ranks[0]) if makes_u else None

    def run() -> list[Tensor]:
        gemm_lowrank(
            out, ps, qs, us, vs, precision="ieee", bias=b_bias, dropout=dropout, seeds=seeds,
            add=add, a=a, config=config,
        )  # fmt: skip
        return []

    return Call(
        run,
        lambda: (
            [p @ q for p, q in zip(ps, qs, strict=True)]
            + [u @ v.to(BF16) for u, v in zip(us, vs, strict=True)]
            + ([ps[0] @ a.to(BF16)] if makes_u else [])
        ),
        [*ps, *qs, *us, *vs, out, *(t for t in (b_bias, seeds, a) if t is not None)],
    )


def weight_grad_call(M, N, ranks, *, one_pass=False, dropout=0.0, transposed=False) -> Call:
    v = torch.randn(M, N).to(BF16)
    us = [torch.randn(M, r).to(BF16) for r in ranks]
    outs = [torch.empty(r, N).T if transposed else torch.empty(N, r) for r in ranks]
    b = torch.randn(N, ranks[0]) if one_pass else None
    seeds = torch.arange(len(ranks)) if dropout else None

    def run() -> list[Tensor]:
        product = weight_grad(
            v, us, outs, precision="ieee", dropout=dropout, seeds=seeds, b=b, factor=0.5
        )
        return [] if product is None else [product]

    return Call(
        run,
        lambda: [v.T @ u for u in us] + ([] if b is None else [v @ b.to(BF16)]),
        [v, *us, *outs, *(t for t in (b, seeds) if t is not None)],
    )


def sum_planes_call(shapes: list[tuple[int, ...]], dtype=F32) -> Call:
    """The planes are partial sums: of the call's tensors they are none."""
    planes = [torch.randn(shape) for shape in shapes]
    outs = [torch.empty(shape[1:], dtype=dtype) for shape in shapes]
    return Call(lambda: sum_planes(planes, outs) or [], lambda: [], outs)


# Tiles in the interpreter: project 32 x 32, weight_grad 32 rows and 64 or 32 columns, ranks in
# steps of at most 64 (gemm) or 128; few rows or columns are split for its 6 processors.
CASES: dict[str, Callable[[], Call]] = {
    "project-aligned": lambda: project_call(256, 64, [16]),
    "project-ragged": lambda: project_call(250, 67, [3]),
    "project-ragged-split": lambda: project_call(40, 190, [3]),
    "project-one-row": lambda: project_call(1, 130, [5], dtype=F32),
    "project-group": lambda: project_call(70, 67, [3, 20, 16], adapter_dtype=BF16),
    "project-group-masked": lambda: project_call(70, 67, [3, 20, 16], dropout=0.1),
    "project-group-of-five": lambda: project_call(70, 67, [3, 4, 5, 6, 7]),
    "project-rank-130": lambda: project_call(40, 66, [130]),
    "project-ranks-130-and-8-masked": lambda: project_call(40, 66, [130, 8], dropout=0.1),
    "y-aligned": lambda: gemm_call(64, 96, [64], [16]),
    "y-aligned-pointers": lambda: gemm_call(64, 96, [64], [16], POINTERS),
    "y-ragged-bias": lambda: gemm_call(70, 72, [40], [3], bias=True),
    "y-ragged-bias-pointers": lambda: gemm_call(70, 67, [37], [3], POINTERS, bias=True),
    "y-rank-80": lambda: gemm_call(70, 72, [40], [80]),
    "y-more-tiles-than-processors": lambda: gemm_call(130, 136, [24], [8]),
    "y-and-h-aligned": lambda: gemm_call(40, 96, [64], [16], makes_u=True),
    "y-and-h-ragged-pointers": lambda: gemm_call(40, 67, [37], [3], makes_u=True, bias=True),
    "dx-aligned": lambda: gemm_call(64, 96, [64], [16], dx=True),
    "dx-ragged-pointers": lambda: gemm_call(70, 67, [37], [3], POINTERS, dx=True),
    "dx-masked": lambda: gemm_call(70, 72, [40], [3], dx=True, dropout=0.1),
    "dx-group": lambda: gemm_call(70, 72, [40, 24, 8], [3, 20, 16], dx=True),
    "dx-group-masked-rank-80": lambda: gemm_call(
        70, 72, [40, 24, 8], [3, 20, 80], dx=True, dropout=0.1
    ),
    "dx-group-masked-pointers": lambda: gemm_call(
        70, 67, [37, 24], [3, 20], POINTERS, dx=True, dropout=0.1
    ),
    "dx-group-of-five-pointers": lambda: gemm_call(
        70, 72, [8] * 5, [3, 4, 5, 6, 7], POINTERS, dx=True, dropout=0.1
    ),
    "add-to-y-pointers": lambda: gemm_call(70, 67, [], [16], add=True, bias=True),
    "add-to-dx-masked-pointers": lambda: gemm_call(
        64, 96, [], [3, 80], dx=True, add=True, dropout=0.1
    ),
    "weight-grad-aligned": lambda: weight_grad_call(64, 384, [16]),
    "weight-grad-ragged": lambda: weight_grad_call(70, 330, [3], transposed=True),
    "weight-grad-split": lambda: weight_grad_call(260, 70, [3], transposed=True),
    "weight-grad-group-masked": lambda: weight_grad_call(70, 330, [3, 20, 16], dropout=0.1),
    "weight-grad-rank-130": lambda: weight_grad_call(70, 66, [130, 8], dropout=0.1),
    "one-pass-aligned": lambda: weight_grad_call(64, 384, [16], one_pass=True),
    "one-pass-ragged-split": lambda: weight_grad_call(260, 70, [3], one_pass=True),
    "one-pass-one-tile": lambda: weight_grad_call(20, 30, [3], one_pass=True),
    "sum-planes": lambda: sum_planes_call([(3, 40, 30), (2, 7), (4, 1024)]),
    "sum-planes-to-16-bit": lambda: sum_planes_call([(5, 33, 70)], BF16),
}


@dataclass
class Result:
    launches: list[Counted]
    call: Call
    made: Sequence[Tensor]


@pytest.fixture(scope="module", params=CASES)
def result(request) -> Result:
    """The launches of a case, counted."""
    call = CASES[request.param]()
    with counted_launches() as launches:
        made = call.run()
    return Result(launches, call, made)


def check_bytes(counted: Counted) -> None:
    stated = counted.stated
    assert stated.loaded == len(counted.loads.addresses())
    assert stated.loaded_by_tiles == counted.loads.total
    assert stated.stored == len(counted.stores.addresses())
    assert stated.stored == counted.stores.total, "a byte is stored twice"


def test_bytes_are_as_stated_and_none_is_stored_twice(result):
    for counted in result.launches:
        check_bytes(counted)


def test_partial_sums_are_what_nobody_asked_for(result):
    for counted in result.launches:
        tensors = [*result.call.tensors, *result.made]
        assert counted.stated.partial == counted.outside(tensors)


def test_flops_are_those_of_the_formula(result):
    with FlopCounterMode(display=False) as formula:
        result.call.formula()
    products = [counted for counted in result.launches if counted.launch.name != "sum_planes"]
    assert sum(counted.stated.flops for counted in products) == formula.get_total_flops()


def test_a_sum_of_planes_adds_every_element():
    with counted_launches() as launches:
        sum_planes([torch.randn(3, 40, 30)], [torch.empty(40, 30)])
    assert [counted.stated.flops for counted in launches] == [3 * 40 * 30]


def launches_of(case: str) -> list[Launch]:
    """What a case would launch."""
    launches: list[Launch] = []
    with intercept(launches.append):
        CASES[case]().run()
    return launches


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("project-ragged", ["project"]),
        ("project-ragged-split", ["project", "sum_planes"]),
        ("weight-grad-ragged", ["weight_grad"]),
        ("weight-grad-split", ["weight_grad", "sum_planes"]),
        ("one-pass-ragged-split", ["weight_grad", "sum_planes"]),
        ("one-pass-one-tile", ["weight_grad"]),
    ],
)
def test_a_case_is_split_as_its_name_says(case, names):
    assert [launch.name for launch in launches_of(case)] == names


@pytest.mark.parametrize("case", [case for case in CASES if case[:2] in ("y-", "dx", "ad")])
def test_a_case_loads_by_descriptor_unless_its_name_says_pointers(case):
    for launch in launches_of(case):
        assert launch.arguments["DESCRIPTORS"] == ("pointers" not in case)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize("ranks", [(4,), (4, 20, 3)], ids=["one", "group"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_every_launch_of_the_op_states_its_bytes(p, ranks, dtype):
    x = torch.randn(2, 35, 72).to(dtype).requires_grad_()
    group = [make_projection(67, 72, r, dtype, F32, bias=True) for r in ranks]
    with counted_launches() as launches:
        ys = fastlora.lora_linears(x, group, dropout=p, backend="triton")
        torch.autograd.backward(ys, [torch.randn_like(y) for y in ys])
    assert {counted.launch.name for counted in launches} >= {
        "project",
        "gemm_lowrank",
        "weight_grad",
    }
    for counted in launches:
        check_bytes(counted)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
def test_the_op_saves_x_h_and_seeds_only(p):
    x = torch.randn(64, 128, dtype=BF16, requires_grad=True)
    group = [make_projection(32, 128, r, BF16, F32, bias=True) for r in (4, 8)]
    parameters = [tensor for projection in group for tensor in projection[:4]]
    storages = saved_bytes(lambda: fastlora.lora_linears(x, group, dropout=p, backend="triton"))
    assert storages.pop(x.untyped_storage().data_ptr()) == 64 * 128 * 2
    for tensor in parameters:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(storages.values()) == 64 * (4 + 8) * 2 + (2 * 8 if p else 0)
