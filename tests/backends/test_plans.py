"""The plans that tuning compares: each one computes a call's product, with the tiles it names."""

import pytest
import torch
from marks import DEVICE

from fastlora.backends.sizes import Sizes
from fastlora.backends.triton.plans import Contest
from fastlora.clock import HostClock, clock_for, medians
from fastlora.kernels.launch import intercept
from fastlora.kernels.plan import FUSED, IN_PLACE, use_plan
from fastlora.kernels.target import TARGETS, use_target

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter stands in for a GPU")
CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
SIZES = {
    "forward": Sizes(40, 48, (32,), ((4,),), F32),
    "forward-few": Sizes(16, 48, (32,), ((4,),), BF16),
    "forward-ragged-dropout": Sizes(70, 45, (37,), ((4,),), F32, dropout=0.25),
    "forward-two-adapters": Sizes(40, 48, (32,), ((4, 8),), BF16),
    "forward-experts": Sizes(40, 48, (32,), ((4,),), F32, experts=3),
    "backward": Sizes(40, 48, (32,), ((4,),), BF16, backward=True),
    "backward-group-dropout": Sizes(
        40, 48, (32, 24), ((4,), (8,)), F32, F32, dropout=0.5, backward=True
    ),
    "backward-two-adapters": Sizes(40, 48, (32,), ((4, 8),), F32, backward=True),
    "backward-experts-dropout": Sizes(
        40, 48, (32,), ((4,),), F32, dropout=0.5, backward=True, experts=3
    ),
}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@every_size
def test_both_plans_and_other_tiles_are_right(sizes):
    contest = Contest(sizes, CPU)
    in_place, *others = contest.plans()[:3]
    for plan in (in_place, *others):
        assert contest.why_wrong(plan) == ""
    for tensor in contest.step(in_place)():
        assert tensor is None or not tensor.isnan().any()


@pytest.fixture(params=["highest", "high"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@every_size
def test_a_plan_s_tiles_are_launched(sizes, precision):
    """Otherwise the default tiles would be measured under their name."""
    for target in TARGETS.values():
        if target.kind == "cpu" or (sizes.dtype == F32 and not target.float32):
            continue
        with use_target(target):
            contest = Contest(sizes, CPU)
            plans = contest.plans()
            assert plans[:2] == [IN_PLACE, FUSED]
            assert len(plans) > 4
            for plan in plans[2:12]:
                launches = []
                with intercept(launches.append):
                    contest.step(plan)()
                (launch,) = [each for each in launches if "gemm" in each.name]
                blocks = [launch.arguments[f"BLOCK_{each}"] for each in "MNK"]
                found = (*blocks, launch.warps, launch.stages, launch.arguments["GROUP"])
                assert found == tuple(vars(plan.gemm).values())[:6], target.name


def test_a_default_is_the_rule_s_whatever_was_measured():
    contest = Contest(SIZES["backward"], CPU)
    with use_plan(IN_PLACE):
        assert contest.default() == FUSED
    with use_target(TARGETS["sm_90"]):
        assert Contest(SIZES["backward"], CPU).default() == IN_PLACE


def test_clocks_take_turns_and_give_medians():
    order, now = [], iter([0.0, 1.0, 1.0, 3.0, 3.0, 8.0, 8.0, 9.0, 9.0, 10.0, 10.0, 16.0])
    clock = HostClock(CPU, lambda: next(now))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert medians(clock, calls, 3) == {"a": 1.0, "b": 2.0}
    assert order == ["a", "b"] * 3
    assert isinstance(clock_for(CPU), HostClock)
