"""Optimised PEFT models on several devices: the numbers of PEFT alone in one process.

The ranks are processes on the CPU.  Each has its rows of the batch (with tensor parallelism, all
rows); the mean of the ranks' losses, and the averaged gradients, are those of the whole batch.
"""

from functools import cache

import peft_training as training
import peft_worker as worker
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_training import LAYERS, STEPS, Record
from ranks import Ranks
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

# Sums in other orders, in float32 (1e-7): 2e-6 was the most, with tensor parallelism.
TOLERANCE = 1e-5
FAST = LAYERS * STEPS

HOOKED = "its base layer is sharded, and gathers or splits what it is called with (DTensor)"

before_and_after = pytest.mark.parametrize("when", ["before", "after"])
kinds = pytest.mark.parametrize(
    "kind",
    [
        "dora",
        pytest.param(
            "lora-bias",
            # The base's layers have biases in attention alone.
            marks=pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
        ),
        "two-adapters",
    ],
)


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """A group of ranks for each size, started when first asked for, and anew after a failure."""
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in started or not started[size].usable:
            started[size] = Ranks(size, tmp_path_factory.mktemp(f"ranks{size}"))
        return started[size]

    yield get
    for ranks in started.values():
        ranks.close()


@pytest.fixture
def two(pools) -> Ranks:
    return pools(2)


@pytest.fixture
def four(pools) -> Ranks:
    return pools(4)


alone = cache(training.alone)  # PEFT in one process: the expected record


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_same(
    records: list[Record], expected: Record, fast: int, tolerance: float = TOLERANCE
) -> None:
    """Losses, first gradients and the trained adapter; ``fast``: how often the fast op ran."""
    assert expected.fast == 0
    assert expected.losses[-1] < 0.999 * expected.losses[0]  # the steps did something
    losses = [
        sum(losses) / len(records) for losses in zip(*(r.losses for r in records), strict=True)
    ]
    assert losses == pytest.approx(expected.losses, rel=tolerance)
    for record in records:
        assert record.fast == fast
        for found, values in (
            (record.gradients, expected.gradients),
            (record.adapter, expected.adapter),
        ):
            assert found.keys() == values.keys()
            errors = {name: relative(found[name], values[name]) for name in values}
            assert max(errors.values()) < tolerance, max(errors, key=errors.get)


def assert_reason(records: list[Record], reason: str) -> None:
    """In forward, every layer is left to PEFT, and coverage says why; between calls it says so too.

    FSDP1's weights are flat between calls, which is a reason of its own.
    """
    for record in records:
        for coverage in (record.inside, record.coverage):
            assert len(coverage.layers) == LAYERS
            assert {layer.plan for layer in coverage.layers} == {"eager"}
        assert {layer.reason for layer in record.inside.layers} == {reason}
        if "FullyShardedDataParallel" not in reason:
            assert {layer.reason for layer in record.coverage.layers} == {reason}


# DDP


@before_and_after
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
    ],
    ids=["plain", "static-graph", "find-unused", "bucket-view"],
)
def test_ddp(two, when, settings):
    assert_same(two.run(worker.ddp, when, **settings), alone(), FAST)


def test_coverage_of_a_ddp_model(two):
    for record in two.run(worker.ddp, "after"):
        assert len(record.coverage.fast) == len(record.inside.fast) == LAYERS


@before_and_after
def test_ddp_with_gradient_accumulation(two, when):
    assert_same(two.run(worker.ddp_accumulated, when), alone(), 2 * FAST)


@before_and_after
def test_ddp_with_an_adapter_that_no_call_uses(two, when):
    records = two.run(worker.ddp, when, "unused-adapter", find_unused_parameters=True)
    assert_same(records, alone(kind="unused-adapter"), FAST)


@before_and_after
def test_ddp_with_dropout(two, when):
    """Both ranks have the same random state, and so the same masks."""
    assert_same(two.run(worker.ddp, when, dropout=0.3), alone(2, dropout=0.3), FAST)


@kinds
def test_ddp_of_each_kind_of_adapter(two, kind):
    assert_same(two.run(worker.ddp, "before", kind), alone(kind=kind), FAST)


def test_check_finds_a_wrong_gradient_that_is_a_view_of_ddp_s_bucket(two):
    assert [verdict for verdict, _ in two.run(worker.ddp_checked, broken=True)] == [False, False]


def test_check_keeps_gradients_that_are_views_of_ddp_s_buckets(two):
    assert two.run(worker.ddp_checked, broken=False) == [(True, 0.0)] * 2


# FSDP2


@before_and_after
@pytest.mark.parametrize("reshards", [True, False], ids=["reshard", "keep"])
def test_fsdp2(two, when, reshards):
    assert_same(two.run(worker.fsdp2, when, reshard_after_forward=reshards), alone(), FAST)


@before_and_after
def test_fsdp2_with_gradient_accumulation(two, when):
    assert_same(two.run(worker.fsdp2_accumulated, when), alone(), 2 * FAST)


@before_and_after
def test_fsdp2_in_evaluation(two, when):
    for fast, error in two.run(worker.fsdp2_evaluated, when):
        assert fast == LAYERS
        assert error < TOLERANCE


@before_and_after
def test_fsdp2_with_dropout(two, when):
    assert_same(two.run(worker.fsdp2, when, dropout=0.3), alone(2, dropout=0.3), FAST)


@kinds
def test_fsdp2_of_each_kind_of_adapter(two, kind):
    assert_same(two.run(worker.fsdp2, "before", kind=kind), alone(kind=kind), FAST)


@before_and_after
def test_fsdp2_of_each_lora_layer(two, when):
    assert_same(two.run(worker.fsdp2, when, "lora-layers"), alone(), FAST)


@before_and_after
def test_restore_of_layers_that_fsdp2_shards_one_by_one(two, when):
    calls, records, bases = zip(*two.run(worker.fsdp2_restored, when), strict=True)
    assert calls == (LAYERS, LAYERS)
    assert_same(records, alone(), fast=0)
    assert bases == ([FSDPModule, PeftLinear],) * 2


@before_and_after
@pytest.mark.parametrize(
    ("units", "reason"),
    [("base-layers", HOOKED), ("adapters", "its lora_A is a FSDPLinear, no torch.nn.Linear")],
    ids=["base-layers", "adapters"],
)
def test_fsdp2_of_parts_of_a_lora_layer_is_left_to_peft(two, when, units, reason):
    records = two.run(worker.fsdp2, when, units)
    assert_same(records, alone(), fast=0)
    assert_reason(records, reason)


@before_and_after
def test_fsdp2_in_bfloat16(two, when):
    """PEFT under the same policy rounds elsewhere: each is 0.06 from float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    expected = two.run(worker.fsdp2, "never", mp_policy=policy)
    records = two.run(worker.fsdp2, when, mp_policy=policy)
    for record, peft in zip(records, expected, strict=True):  # each has losses of its own
        assert_same([record], peft, FAST, tolerance=0.1)


@before_and_after
def test_fsdp2_with_weights_that_are_loaded_last(two, when):
    assert_same(two.run(worker.fsdp2_from_meta, when), alone(), FAST)


@before_and_after
def test_fsdp2_with_cpu_offload(two, when):
    policy = CPUOffloadPolicy(pin_memory=False)  # there is nothing to pin for
    assert_same(two.run(worker.fsdp2, when, offload_policy=policy), alone(), FAST)


@pytest.mark.parametrize("p", [0.0, 0.3], ids="p{}".format)
@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "wrapper"])
def test_fsdp2_of_checkpointed_blocks(two, how, p):
    """Every layer runs twice, with the same masks."""
    records = two.run(worker.fsdp2_checkpointed, "before", how, p)
    assert_same(records, alone(2, dropout=p), 2 * FAST)


def test_fsdp2_of_compiled_blocks(two):
    assert_same(two.run(worker.fsdp2_compiled, "before"), alone(), FAST)


@before_and_after
def test_fsdp2_sharded_and_replicated(four, when):
    assert_same(four.run(worker.hsdp, when), alone(), FAST)


def test_coverage_in_the_forward_of_an_fsdp2_model(two):
    for record in two.run(worker.fsdp2, "after"):
        assert len(record.inside.fast) == LAYERS


@pytest.mark.parametrize("kind", ["lora", "dora", "lora-bias", "two-adapters"])
def test_coverage_between_calls_of_an_fsdp2_model(two, kind):
    """It is what a call will find that counts, and FSDP gathers the weights for that."""
    for record in two.run(worker.fsdp2, "after", kind=kind):
        assert len(record.coverage.fast) == LAYERS


def test_coverage_between_calls_of_a_model_sharded_and_replicated(four):
    for record in four.run(worker.hsdp, "after"):
        assert len(record.coverage.fast) == LAYERS


def test_check_of_an_fsdp2_model(two):
    for text in two.run(worker.fsdp2_checked):
        assert f"({LAYERS} of {LAYERS} layers fast) and PEFT: the same within rounding" in text


def test_restore_of_layers_that_are_replicated_one_by_one(two):
    pytest.importorskip(
        "torch.distributed._composable.replicate_with_fsdp", reason="newer than torch 2.8"
    )
    for before, restored in two.run(worker.replicated_and_restored):
        assert before == restored


# FSDP1


@before_and_after
def test_fsdp1(two, when):
    assert_same(two.run(worker.fsdp1, when), alone(), FAST)


def test_fsdp1_with_dropout(two):
    assert_same(two.run(worker.fsdp1, "before", dropout=0.3), alone(2, dropout=0.3), FAST)


@before_and_after
def test_fsdp1_by_peft_s_policy_is_left_to_peft(two, when):
    """It wraps each module that trains, lora_A and lora_B among them."""
    records = two.run(worker.fsdp1, when, units="adapters")
    assert_same(records, alone(), fast=0)
    assert_reason(records, "its lora_A is a FullyShardedDataParallel, no torch.nn.Linear")


# ZeRO-3


@before_and_after
@pytest.mark.parametrize("persists", [0, 200], ids=["nothing-persists", "adapters-persist"])
def test_zero3_is_left_to_peft(two, when, persists):
    records = two.run(worker.zero3, when, persists=persists)
    assert_same(records, alone(), fast=0)
    assert_reason(records, "DeepSpeed ZeRO-3 gathers its base layer when it is called")


def test_zero3_gathers_what_it_gathers_for_peft(two):
    """Looking whether a call can be fast reads no weight: that would gather it."""
    expected = two.run(worker.zero3, "never")[0].external
    assert {record.external for record in two.run(worker.zero3, "before")} == {expected}


@before_and_after
def test_zero3_with_decoder_blocks_as_its_leaves(two, when):
    """No hook is on what a block contains, and all of it is whole in the block's forward."""
    assert_same(two.run(worker.zero3, when, leaves=True), alone(), FAST)


# Tensor parallel


@before_and_after
def test_torch_s_tensor_parallel_is_left_to_peft(two, when):
    records = two.run(worker.torch_tensor_parallel, when)
    assert_same(records, alone(), fast=0)
    assert_reason(records, HOOKED)


def test_transformers_tensor_parallel_is_left_to_peft(two, tmp_path):
    training.base_model().save_pretrained(tmp_path)
    records = two.run(worker.transformers_tensor_parallel, "after", str(tmp_path))
    assert_same(records, alone(), fast=0)
    assert_reason(records, HOOKED)


@before_and_after
def test_tensor_parallel_and_fsdp2_are_left_to_peft(four, when):
    records = four.run(worker.tensor_parallel_and_fsdp2, when)
    assert_same(records, alone(), fast=0)
    assert_reason(records, HOOKED)


@before_and_after
def test_distributed_tensors_are_left_to_peft(two, when):
    for fast, error in two.run(worker.distributed_tensors, when):
        assert fast == 0
        assert error < TOLERANCE
