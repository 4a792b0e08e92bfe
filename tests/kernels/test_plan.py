"""Plans decide whether torch or a kernel multiplies by the base weight.

A measurement of a similar call decides; without one, a rule does.
"""

from dataclasses import replace

import pytest
import torch
from kernel_cases import launched

from fastlora.backends import protocol, triton
from fastlora.call.projection import Layout
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.launch import Launch
from fastlora.kernels.plan import FUSED, IN_PLACE, Plan, Row, plan_for, use_plan, use_rows
from fastlora.kernels.target import TARGETS, target_of, use_target

CPU = torch.device("cpu")
TUNED = Plan(fused=True, gemm=GemmConfig(16, 32, 64, warps=4, stages=3))


def planned(
    m=4096, n=4096, k=4096, r=16, ranks=None, masked=False, backward=False, width=None,
    target=TARGETS["sm_90"], dtype=torch.bfloat16,
):  # fmt: skip
    """The plan for x [m, width]; width is the depth k except for groups."""
    x = torch.empty(m, width or k, dtype=dtype, device="meta")
    with use_target(target):
        return plan_for(x, n, k, ranks or [r], "ieee", masked=masked, backward=backward)


MEASURED = replace(TARGETS["sm_90"], device="NVIDIA H100")


@pytest.fixture
def table():
    """Sets the measured rows of the device MEASURED."""
    yield lambda *rows: use_rows(rows)
    use_rows(())


def row(**changes):
    sizes = {"m": 4096, "n": 4096, "k": 4096, "r": 16, "itemsize": 2}
    kind = {"device": "NVIDIA H100", "masked": False, "projections": 1, "plan": TUNED}
    return Row(**sizes | kind | changes)


def launches(m, n, k, r, dtype=torch.bfloat16, target=TARGETS["sm_90"]) -> list[Launch]:
    """The launches of one forward, on meta tensors."""
    x, weight, lora_a, lora_b = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, k), (n, k), (r, k), (n, r))
    )
    call = protocol.Call((Layout(False, (1.0,)),), 0.0, triton)
    return launched(lambda: triton.forward([x, weight, lora_a, lora_b], None, call), target)


FEW, MANY = {"m": 64}, {"m": 10**6}
SHORT = MANY | {"k": 2048}


@pytest.mark.parametrize(
    ("names", "call", "plan"),
    [
        (["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"], FEW, FUSED),
        (["gfx942", "gfx950", "gfx11"], FEW, IN_PLACE),
        (["sm_80", "sm_90"], FEW | {"dtype": torch.float32}, IN_PLACE),
        (["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"], MANY, IN_PLACE),
        (["sm_86", "sm_90", "sm_120"], SHORT, FUSED),
        (["sm_80", "sm_100", "gfx942"], SHORT, IN_PLACE),
        (["sm_86", "sm_90", "sm_120"], SHORT | {"dtype": torch.float32}, IN_PLACE),
        (["interpreter"], MANY, FUSED),
    ],
)
def test_the_rule_of_a_target(names, call, plan):
    for name in names:
        assert planned(target=TARGETS[name], **call) == plan, name


def test_an_in_place_plan_launches_only_the_low_rank_sum():
    assert launches(10**6, 4096, 4096, 16, target=TARGETS["sm_80"])[-1].name == "lowrank"
    assert launches(10**6, 4096, 4096, 16, target=TARGETS["interpreter"])[-1].name == "gemm_lowrank"


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


@pytest.mark.parametrize(
    ("name", "near", "far"), [("m", 16, 1024), ("n", 1024, 8192), ("k", 1024, 8192), ("r", 8, 64)]
)
def test_the_nearest_row_wins(table, name, near, far):
    other = Plan(fused=True, gemm=GemmConfig(64, 32, 128, warps=4, stages=3))
    table(row(**{name: far}, plan=other), row(**{name: near}), row(**{name: far}, plan=other))
    assert planned(**{name: near}, target=MEASURED) == TUNED
    assert planned(**{name: far}, target=MEASURED) == other


@pytest.mark.parametrize(
    "change",
    [
        {"device": "NVIDIA H200"}, {"itemsize": 4}, {"masked": True}, {"backward": True},
        {"m": 4096 * 8}, {"n": 512}, {"k": 1024, "n": 1024, "m": 8192},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_of_another_kind_or_far_away_says_nothing(table, change):
    table(row(**change))
    assert planned(target=MEASURED) == IN_PLACE
    table(row(**change), row())
    assert planned(target=MEASURED) == TUNED
    assert planned() == IN_PLACE  # the target isn't the measured device


def test_rows_of_segments_are_for_segments(table):
    """The number of segments counts as a size."""
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")

    def of_experts(count):
        with use_target(MEASURED):
            return plan_for(x, 4096, 4096, [16], "ieee", segments=count)

    table(row())
    assert of_experts(8) == FUSED
    table(row(segments=8))
    assert [of_experts(count) for count in (8, 32, 64)] == [TUNED, TUNED, FUSED]
    assert planned(target=MEASURED) == IN_PLACE


def test_the_depth_of_a_group_is_the_sum(table):
    """The depth is an argument of its own, because x has the depth of one projection only."""
    table(row(k=3 * 4096, projections=3))
    assert planned(k=3 * 4096, width=4096, ranks=[16] * 3, target=MEASURED) == TUNED
    assert planned(k=2**17, width=4096, ranks=[16] * 3, target=MEASURED) == IN_PLACE


def test_tiles_of_a_neighbor_that_are_too_much_give_way_to_the_default(table):
    """A row may have been tuned for operands that fit descriptors, a smaller rank, or more rows."""
    tiles = GemmConfig(128, 256, 64, warps=8, stages=3, descriptors=True)
    table(row(plan=Plan(fused=True, gemm=tiles)))
    for sizes in ((8192, 4096, 4096, 16), (8192, 4098, 4100, 16), (64, 4096, 4096, 32)):
        arguments = launches(*sizes, target=MEASURED)[-1].arguments
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
def test_a_forced_plan_ends_with_its_block(use, current, outer, inner):
    before = current()
    with use(outer):
        with use(inner):
            assert current() == inner
        assert current() == outer
        with pytest.raises(KeyError), use(inner):
            raise KeyError
        assert current() == outer
    assert current() == before
