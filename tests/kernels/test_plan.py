"""Plans: the nearest row of the device's table decides who multiplies by the base weight."""

import pytest
import torch

from fastlora import Projection
from fastlora.backends import triton
from fastlora.kernels import plan as plans
from fastlora.kernels.config import GemmConfig
from fastlora.kernels.launch import intercept
from fastlora.kernels.plan import FUSED, IN_PLACE, ROWS, Plan, Row, plan_for, use_plan
from fastlora.kernels.target import TARGETS, use_target


def planned(m=4096, n=4096, k=4096, r=16, dtype=torch.bfloat16, name="sm_90", **options):
    x = torch.empty(m, k, dtype=dtype, device="meta")
    with use_target(TARGETS[name]):
        return plan_for(x, n, k, [r], "ieee", **options)


@pytest.fixture
def table(monkeypatch):
    """Replaces the shipped rows."""

    def use(*rows):
        monkeypatch.setattr(plans, "ROWS", rows)
        plans._nearest.cache_clear()

    yield use
    monkeypatch.undo()
    plans._nearest.cache_clear()


def row(
    m=4096,
    n=4096,
    k=4096,
    r=16,
    itemsize=2,
    masked=False,
    projections=1,
    target="sm_90",
    plan=IN_PLACE,
):
    return Row(target, m, n, k, r, itemsize, masked, projections, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_a_row_for_every_dtype(name, dtype):
    """Devices that nobody measured multiply with torch; the interpreter takes the fused kernel."""
    expected = FUSED if name == "interpreter" else IN_PLACE
    for m, masked in ((1, False), (10**6, True)):
        assert planned(m=m, dtype=dtype, name=name, masked=masked) == expected


def test_shipped_rows_name_targets_that_exist():
    assert {shipped.target for shipped in ROWS} == set(TARGETS)


TUNED = Plan(fused=True, gemm=GemmConfig(16, 32, 64, warps=4, stages=3))


@pytest.mark.parametrize(
    ("near", "far"),
    [
        ({"m": 16}, {"m": 4096}),
        ({"n": 1024}, {"n": 8192}),
        ({"k": 1024}, {"k": 8192}),
        ({"r": 8}, {"r": 64}),
        ({"masked": True}, {"masked": False}),
    ],
    ids=lambda sizes: ", ".join(sizes),
)
def test_the_nearest_row_wins(table, near, far):
    table(row(**far), row(**near, plan=TUNED), row(**far))
    assert planned(**near) == TUNED
    assert planned(**far) == IN_PLACE


def test_distances_are_ratios(table):
    table(row(m=64, plan=TUNED), row(m=4096))
    assert planned(m=500) == TUNED
    assert planned(m=530) == IN_PLACE


@pytest.mark.parametrize(
    "other", [{"target": "sm_80"}, {"itemsize": 4}], ids=["target", "itemsize"]
)
def test_rows_of_another_kind_are_never_near(table, other):
    table(row(m=1), row(**other, plan=TUNED))
    assert planned() == IN_PLACE


def test_the_depth_of_a_group_is_the_sum(table):
    """It is an argument of its own, since x has the depth of one projection."""
    x = torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta")
    table(row(k=1024), row(k=3 * 4096, plan=TUNED))
    with use_target(TARGETS["sm_90"]):
        assert plan_for(x, 4096, 3 * 4096, [16, 16, 16], "ieee") == TUNED
        assert plan_for(x, 4096, 1024, [16, 16, 16], "ieee") == IN_PLACE


def test_a_group_is_nearest_to_a_group(table):
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    table(row(), row(projections=3, plan=TUNED))
    with use_target(TARGETS["sm_90"]):
        assert plan_for(x, 4096, 4096, [16, 16, 16], "ieee") == TUNED
        assert plan_for(x, 4096, 4096, [16], "ieee") == IN_PLACE


def test_the_largest_rank_of_a_group_counts(table):
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    table(row(r=8), row(r=64, plan=TUNED))
    with use_target(TARGETS["sm_90"]):
        assert plan_for(x, 4096, 4096, [8, 64], "ieee") == TUNED


def test_tiles_of_a_neighbour_that_are_too_much_give_way_to_the_default(table):
    """A row may have been tuned for operands that fit descriptors, a smaller rank, or more rows."""
    tiles = GemmConfig(128, 256, 64, warps=8, stages=3, descriptors=True)
    table(row(plan=Plan(fused=True, gemm=tiles)))
    chosen = []
    for rows, n, k, r in ((8192, 4096, 4096, 16), (8192, 4098, 4100, 16), (64, 4096, 4096, 32)):
        x, weight, lora_a, lora_b = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in ((rows, k), (n, k), (r, k), (n, r))
        )
        records = []
        with use_target(TARGETS["sm_90"]), intercept(records.append):
            triton.forward(x, [Projection(weight, lora_a, lora_b)], dropout=0.0, seed=None)
        arguments = records[-1].arguments
        chosen.append((arguments["BLOCK_M"], arguments["BLOCK_N"]))
    assert chosen[0] == (128, 256)
    assert (128, 256) not in chosen[1:]


def test_a_forced_plan_is_for_the_block_alone():
    with use_plan(FUSED):
        with use_plan(TUNED):
            assert planned() == TUNED
        assert planned() == FUSED
    assert planned() == IN_PLACE


def test_a_forced_plan_ends_with_an_exception():
    with pytest.raises(KeyError), use_plan(FUSED):
        raise KeyError
    assert planned() == IN_PLACE
