"""Optimized PEFT models on several devices give the same numbers as PEFT in one process.

The ranks are processes on the CPU.  Each has its own rows of the batch (with tensor parallelism,
all rows).  Losses and gradients, averaged over the ranks, equal the whole batch's.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import fsdp_worker as mixed
import peft_worker as worker
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_worker import LAYERS, STEPS, Record
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

# For float32 sums in different orders.  The largest error measured was 2e-6, for tensor
# parallelism.
TOLERANCE = 1e-5
FAST = LAYERS * STEPS
BEFORE, BOTH = ("before",), ("before", "after")  # when the model is optimized, relative to wrapping

alone = cache(worker.alone)  # PEFT in one process: the expected record


def assert_same(
    records: list[Record], expected: Record, fast: int, tolerance: float = TOLERANCE
) -> None:
    """Compare losses, first gradients and the trained adapter; ``fast``: calls of the fast op."""
    assert expected.fast == 0
    assert expected.losses[-1] < 0.999 * expected.losses[0]  # the steps did something
    losses = [sum(each) / len(each) for each in zip(*(r.losses for r in records), strict=True)]
    assert losses == pytest.approx(expected.losses, rel=tolerance)
    for record in records:
        assert record.fast == fast
        for name in ("gradients", "adapter"):
            found, values = getattr(record, name), getattr(expected, name)
            assert found.keys() == values.keys()
            errors = {n: ((found[n] - v).norm() / v.norm()).item() for n, v in values.items()}
            assert max(errors.values()) < tolerance, max(errors, key=errors.get)


class Case(NamedTuple):
    """The function that ranks run, its settings, and how often each layer runs in a step."""

    run: Callable[..., Record]
    settings: Mapping[str, Any] = MappingProxyType({})
    runs: int = 1
    whens: tuple[str, ...] = BEFORE
    # The coverages of a record that name every layer.  Between calls, FSDP's layers are sharded and
    # ZeRO-3's are empty, which coverage reports as reasons of their own.
    coverage: tuple[str, ...] = ("inside", "coverage")
    reason: str = ""  # why every layer runs PEFT's forward


FAST_CASES = {
    "ddp": Case(worker.ddp, whens=BOTH),
    "ddp-dropout": Case(worker.ddp, {"dropout": 0.3, "gradient_as_bucket_view": True}),
    "fsdp2": Case(worker.fsdp2, {"reshard_after_forward": True}, whens=BOTH),
    **{
        f"fsdp2-{kind}": Case(worker.fsdp2, {"kind": kind})
        for kind in ("dora", "lora-bias", "two-adapters")
    },
    "fsdp2-each-lora-layer": Case(  # sharded until its own call
        worker.fsdp2, {"units": "lora-layers"}, coverage=("coverage",)
    ),
    "fsdp2-loaded-last": Case(worker.fsdp2_from_meta),
    **{  # every layer runs twice, with the same masks
        f"fsdp2-{how}-checkpoints": Case(
            worker.fsdp2_checkpointed, {"how": how, "dropout": 0.3}, runs=2
        )
        for how in ("reentrant", "wrapper")
    },
    "fsdp1": Case(worker.fsdp1, whens=BOTH),
    # A leaf's submodules have no hooks, and all of them are gathered during the leaf's forward.
    "zero3-blocks-as-leaves": Case(worker.zero3, {"leaves": True}, coverage=("inside",)),
}


def cases(table: dict[str, Case]):
    return pytest.mark.parametrize(
        ("case", "when"),
        [
            pytest.param(case, when, id=f"{name}-{when}")
            for name, case in table.items()
            for when in case.whens
        ],
    )


# Only the base's attention layers have biases.
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@cases(FAST_CASES)
def test_each_layer_runs_fast(case, when, two):
    """All ranks have the same random state, and so the same masks."""
    records = two.run(case.run, when, **case.settings)
    kind, p = case.settings.get("kind", "lora"), case.settings.get("dropout", 0.0)
    assert_same(records, alone(2 if p else 1, kind, p), case.runs * FAST)
    for record in records:
        for moment in case.coverage:
            found = getattr(record, moment)
            assert len(found.layers) == LAYERS
            assert len(found.fast) == LAYERS or (moment == "coverage" and not found.not_fast)


HOOKED = "its base layer is sharded, and gathers or splits what it is called with (DTensor)"
GATHERED = "DeepSpeed ZeRO-3 gathers its base layer when it is called"
LEFT_TO_PEFT = {
    "fsdp2-base-layers": Case(worker.fsdp2, {"units": "base-layers"}, whens=BOTH, reason=HOOKED),
    "fsdp2-adapters": Case(worker.fsdp2, {"units": "adapters"}, coverage=()),
    # PEFT's policy wraps each trainable module by itself.
    "fsdp1-adapters": Case(worker.fsdp1, {"units": "adapters"}, coverage=()),
    "zero3": Case(worker.zero3, reason=GATHERED),
    "tensor-parallel": Case(worker.torch_tensor_parallel, reason=HOOKED),
}


def assert_left_to_peft(records: list[Record], case: Case) -> None:
    assert_same(records, alone(), fast=0)
    for record in records:
        for coverage in (record.inside, record.coverage):
            assert len(coverage.layers) == LAYERS
            assert not coverage.fast
        for moment in case.coverage:
            assert {layer.reason for layer in getattr(record, moment).layers} == {case.reason}


@cases(LEFT_TO_PEFT)
def test_each_layer_is_left_to_peft(case, when, two):
    assert_left_to_peft(two.run(case.run, when, **case.settings), case)


def test_fsdp2_in_bfloat16(two):
    """PEFT under the same policy rounds at other places: both differ from float32 by 0.06."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    expected = two.run(worker.fsdp2, "never", mp_policy=policy)
    records = two.run(worker.fsdp2, "before", mp_policy=policy)
    for record, peft in zip(records, expected, strict=True):  # each rank has its own losses
        assert_same([record], peft, FAST, tolerance=0.1)


def test_restore_of_layers_that_fsdp2_shards_one_by_one(two):
    calls, records, bases = zip(*two.run(worker.fsdp2_restored, "before"), strict=True)
    assert calls == (LAYERS, LAYERS)
    assert_same(records, alone(), fast=0)
    assert bases == ([FSDPModule, PeftLinear],) * 2


def test_check_judges_and_keeps_gradients_that_are_views_of_ddp_s_buckets(two):
    assert [verdict for verdict, _ in two.run(worker.ddp_checked, broken=True)] == [False, False]
    assert two.run(worker.ddp_checked, broken=False) == [(True, 0.0)] * 2


def test_check_of_an_fsdp2_model(two):
    counts = f"(0 of {LAYERS} layers fast, {LAYERS} sharded)"
    for text in two.run(worker.fsdp2_checked):
        assert f"{counts} and PEFT: the same within rounding" in text


def test_zero3_gathers_the_same_parameters_as_for_peft(two):
    """Deciding whether a call can be fast must not read a weight, because that would gather it."""
    expected = two.run(worker.zero3, "never")[0].external
    assert {record.external for record in two.run(worker.zero3, "before")} == {expected}


# Many adapters, and experts: the same gradients as for the whole batch.
TOGETHER = {
    "peft": (mixed.mixed_peft, {"find_unused_parameters": True}),
    # Each rank names every trainable adapter, but for different samples.
    "peft-all-named": (
        mixed.mixed_peft, {"names": [*"pqsttspt" "qp"], "gradient_as_bucket_view": True},
    ),
    "experts-fsdp2": (mixed.experts, {}),
}  # fmt: skip


@pytest.mark.parametrize(("run", "settings"), TOGETHER.values(), ids=TOGETHER)
def test_ranks_together_have_the_gradients_of_the_whole_batch(run, settings, two):
    """Also for an adapter without rows on one rank or on both."""
    of_one = {k: v for k, v in settings.items() if k == "names"}
    expected = run(1, **of_one)
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    for found in two.run(run, 2, **settings):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            pair = found[name], value
            if any(gradient is None for gradient in pair):  # DDP gives zeros in their place
                assert not any(gradient is not None and gradient.any() for gradient in pair), name
            else:
                torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6, msg=name)


BITSANDBYTES = pytest.mark.skipif(
    not find_spec("bitsandbytes"), reason="bitsandbytes isn't installed"
)
QUANTIZED = {
    "bytes": (torch.uint8, None, "block"),
    "float32": (torch.float32, None, "model"),
    "16-bits": (torch.bfloat16, torch.bfloat16, "block"),
    "each-layer": (torch.bfloat16, None, "layers"),
}


@BITSANDBYTES
@pytest.mark.parametrize(("storage", "cast", "units"), QUANTIZED.values(), ids=QUANTIZED)
def test_4_bit_layers_under_fsdp2_have_the_numbers_of_one_process(two, storage, cast, units):
    expected = mixed.step_of(mixed.quantized_mlp("peft")).numbers
    for found in two.run(mixed.quantized_sharded, storage, units, cast):
        for one, other in zip(found.numbers, expected, strict=True):
            assert (one - other).norm() <= (1e-6 if cast is None else 0.02) * other.norm()
        # FSDP2 gathers by hooks, and a fused block doesn't call its layers
        hooked = units == "layers"
        assert found.blocks == (0 if hooked else 1)
        assert found.report.startswith("0 of 3 layers fast, 3 sharded")


@pytest.mark.parametrize("kind", ["lora", "two-adapters"])
def test_between_calls_the_report_says_that_calls_decide(two, kind):
    for first, after in two.run(mixed.reports, kind):
        assert str(after) == str(first)
        text = str(first)
        assert text.startswith(f"0 of {LAYERS} layers fast, {LAYERS} sharded\n{LAYERS} sharded: ")
        assert "more: decided in the call\n0 of 2 gated MLPs as one block\n2 sharded: " in text
        assert first.notes == first.not_fast == ()
        assert first.layers[0].name == "base_model.model.model.layers.0.self_attn.q_proj"


def test_peft_s_policy_is_named_with_the_setting_that_avoids_it(two):
    for text in two.run(mixed.report_by_peft_s_policy):
        assert text.startswith(f"0 of {LAYERS} layers fast, {LAYERS} sharded")
        assert "FSDP wraps lora_A and lora_B by themselves: PEFT's fsdp_auto_wrap_policy" in text
        assert 'FSDP2 (in fsdp_config "version": 2) doesn\'t' in text


@pytest.mark.parametrize("kind", mixed.LEFT_OUT)
def test_parameters_that_are_not_synchronized_are_named(two, kind):
    layer = "lm_head" if kind == "fsdp2-head" else "layers.0.self_attn.q_proj"
    for texts in two.run(mixed.notes, kind, "left out"):
        for text in texts:
            assert "plain parameters that FSDP, DDP or ZeRO leaves out" in text
            assert "Attach adapters before fully_shard" in text
            assert f"{layer}.lora_A" in text


@pytest.mark.parametrize("kind", mixed.TAKEN)
def test_synchronized_parameters_are_not_named(two, kind):
    for texts in two.run(mixed.notes, kind, "taken"):
        assert not any("leaves out" in text for text in texts)
