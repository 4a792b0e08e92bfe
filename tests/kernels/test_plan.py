"""Plans: the nearest row of the device's table decides who multiplies by the base weight."""

from itertools import product

import pytest
import torch

from fastlora.backends import protocol, triton
from fastlora.kernels import plan as plans
from fastlora.kernels.config import Call
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.plan import FUSED, IN_PLACE, ROWS, Plan, Row, plan_for, use_plan
from fastlora.kernels.target import TARGETS, target_of, use_target
from fastlora.projection import Layout

CPU = torch.device("cpu")


def planned(m=4096, n=4096, k=4096, r=16, ranks=None, masked=False, backward=False, width=None):
    """For x [m, width], as wide as the depth k unless that is a group's."""
    x = torch.empty(m, width or k, dtype=torch.bfloat16, device="meta")
    with use_target(TARGETS["sm_90"]):
        return plan_for(x, n, k, ranks or [r], "ieee", masked=masked, backward=backward)


@pytest.fixture
def table(monkeypatch):
    """Replaces the shipped rows."""

    def use(*rows):
        monkeypatch.setattr(plans, "ROWS", rows)
        plans._nearest.cache_clear()

    yield use
    monkeypatch.undo()
    plans._nearest.cache_clear()


def row(**changes):
    sizes = {"m": 4096, "n": 4096, "k": 4096, "r": 16, "itemsize": 2}
    kind = {"target": "sm_90", "masked": False, "projections": 1, "plan": IN_PLACE}
    return Row(**sizes | kind | changes)


def launched(m, n, k, r, dtype=torch.bfloat16, name="sm_90") -> list[Launch]:
    """The launches of one forward, on tensors without memory."""
    x, weight, lora_a, lora_b = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, k), (n, k), (r, k), (n, r))
    )
    records: list[Launch] = []
    with use_target(TARGETS[name]), intercept(records.append):
        triton.forward(
            [x, weight, lora_a, lora_b], None, protocol.Call((Layout(False, (1.0,)),), 0.0, triton)
        )
    return records


@pytest.mark.parametrize("m", [1, 10**6])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, dtype in product(TARGETS, [torch.bfloat16, torch.float16, torch.float32])
        if (name, dtype) != ("gfx11", torch.float32) and (name != "sm_90" or dtype == torch.float32)
    ],
    ids=str,
)
def test_a_target_that_nobody_measured_or_modelled_multiplies_with_torch(name, m, dtype):
    """And launches the sum with the adapter; the interpreter takes the fused kernel.

    gfx11's tensor cores have no float32, which runs on torch alone.
    """
    record = launched(m, 4096, 4096, 16, dtype, name)[-1]
    assert record.name == ("gemm_lowrank" if name == "interpreter" else "lowrank")


@pytest.mark.parametrize(
    "shipped",
    ROWS,
    ids=lambda row: f"{row.target}-{row.itemsize}-{row.m}" + "-experts" * row.segments,
)
def test_a_shipped_row_is_the_plan_of_its_own_call_and_fits_it(shipped):
    target = TARGETS[shipped.target]
    call = Call(
        shipped.m * (8 if shipped.segments else 1), shipped.n, shipped.r, shipped.itemsize, "ieee",
        shipped.projections, shipped.masked, segments=8 * shipped.segments,
    )  # fmt: skip
    assert plans._nearest(target, call, shipped.k, shipped.backward) == shipped.plan
    assert shipped.plan.gemm is None or not shipped.plan.gemm.why_not(target, call)


@pytest.mark.parametrize(
    ("plan", "call"),
    [
        (FUSED, {"m": 1}),
        (FUSED, {"m": 64, "k": 14336}),
        (IN_PLACE, {"m": 64, "backward": True}),
        (IN_PLACE, {"m": 16, "masked": True}),
        (IN_PLACE, {"m": 65}),
        (IN_PLACE, {"m": 512, "k": 1024}),
        (FUSED, {"m": 2048, "k": 1024}),
        (FUSED, {"m": 2048, "k": 2048, "n": 14336}),
        (FUSED, {"m": 16384, "k": 2048, "masked": True, "backward": True}),
        (IN_PLACE, {"m": 16384, "k": 3072}),
        (IN_PLACE, {"m": 8192, "k": 6144, "ranks": [16] * 3, "width": 4096, "backward": True}),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_an_h100_follows_the_model_of_time(plan, call):
    assert planned(**call) == plan


@pytest.mark.parametrize(
    ("name", "rows_of_one", "k", "plan"),
    [
        ("sm_90", 256, 2048, FUSED),
        ("sm_90", 256, 8192, FUSED),
        ("sm_90", 8192, 2048, FUSED),
        ("sm_90", 8192, 8192, IN_PLACE),
        ("sm_80", 8192, 8192, FUSED),
    ],
)
def test_experts_are_fused_unless_torch_has_a_kernel_for_their_long_products(
    name, rows_of_one, k, plan
):
    x = torch.empty(8 * rows_of_one, k, dtype=torch.bfloat16, device="meta")
    with use_target(TARGETS[name]):
        assert plan_for(x, 4096, k, [16], "ieee", segments=8) == plan


TUNED = Plan(fused=True, gemm=GemmConfig(16, 32, 64, warps=4, stages=3))


@pytest.mark.parametrize(
    ("name", "near", "far"),
    [("m", 16, 4096), ("n", 1024, 8192), ("k", 1024, 8192), ("r", 8, 64), ("masked", True, False)],
)
def test_the_nearest_row_wins(table, name, near, far):
    table(row(**{name: far}), row(**{name: near}, plan=TUNED), row(**{name: far}))
    assert planned(**{name: near}) == TUNED
    assert planned(**{name: far}) == IN_PLACE


def test_the_depth_of_a_group_is_the_sum(table):
    """It is an argument of its own, since x has the depth of one projection."""
    table(row(k=1024), row(k=3 * 4096, plan=TUNED))
    assert planned(k=3 * 4096, width=1024, ranks=[16] * 3) == TUNED
    assert planned(k=1024, ranks=[16] * 3) == IN_PLACE


def test_tiles_of_a_neighbour_that_are_too_much_give_way_to_the_default(table):
    """A row may have been tuned for operands that fit descriptors, a smaller rank, or more rows."""
    tiles = GemmConfig(128, 256, 64, warps=8, stages=3, descriptors=True)
    table(row(plan=Plan(fused=True, gemm=tiles)))
    for sizes in ((8192, 4096, 4096, 16), (8192, 4098, 4100, 16), (64, 4096, 4096, 32)):
        arguments = launched(*sizes)[-1].arguments
        chosen = arguments["BLOCK_M"], arguments["BLOCK_N"]
        assert (chosen == (128, 256)) == (sizes == (8192, 4096, 4096, 16))


@pytest.mark.parametrize(
    ("use", "current", "outer", "inner"),
    [
        (use_plan, planned, FUSED, TUNED),
        (use_target, lambda: target_of(CPU), TARGETS["sm_80"], TARGETS["sm_90"]),
    ],
    ids=["plan", "target"],
)
def test_what_is_forced_is_for_the_block_alone_however_it_ends(use, current, outer, inner):
    before = current()
    with use(outer):
        with use(inner):
            assert current() == inner
        assert current() == outer
        with pytest.raises(KeyError), use(inner):
            raise KeyError
        assert current() == outer
    assert current() == before
