"""Optimised PEFT models on several devices: the numbers of PEFT alone in one process.

The ranks are processes on the CPU.  Each has its rows of the batch (with tensor parallelism, all
rows); the mean of the ranks' losses, and the averaged gradients, are those of the whole batch.
"""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import mixed_worker as mixed
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
BEFORE, BOTH = ("before",), ("before", "after")  # it is wrapped

before_and_after = pytest.mark.parametrize("when", BOTH)
alone = cache(training.alone)  # PEFT in one process: the expected record


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


def assert_same(
    records: list[Record], expected: Record, fast: int, tolerance: float = TOLERANCE
) -> None:
    """Losses, first gradients and the trained adapter; ``fast``: how often the fast op ran."""
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
    """What the ranks do, and how often each layer runs in a step."""

    run: Callable[..., Record]
    settings: Mapping[str, Any] = MappingProxyType({})
    runs: int = 1
    ranks: int = 2
    whens: tuple[str, ...] = BOTH
    # Of a record: those that say of every layer what it is.  Between calls FSDP's are sharded, and
    # ZeRO-3's are parts, which is a reason of its own.
    coverage: tuple[str, ...] = ("inside", "coverage")
    reason: str = ""  # why every layer is left to PEFT


FAST_CASES = {
    "ddp": Case(worker.ddp),
    "ddp-static-graph": Case(worker.ddp, {"static_graph": True}),
    "ddp-find-unused": Case(worker.ddp, {"find_unused_parameters": True}),
    "ddp-bucket-view": Case(worker.ddp, {"gradient_as_bucket_view": True}),
    "ddp-accumulation": Case(worker.ddp_accumulated, runs=2),
    "ddp-unused-adapter": Case(
        worker.ddp, {"kind": "unused-adapter", "find_unused_parameters": True}
    ),
    "ddp-dropout": Case(worker.ddp, {"dropout": 0.3}),
    "fsdp2": Case(worker.fsdp2, {"reshard_after_forward": True}),
    "fsdp2-no-reshard": Case(worker.fsdp2, {"reshard_after_forward": False}),
    "fsdp2-accumulation": Case(worker.fsdp2_accumulated, runs=2),
    "fsdp2-dropout": Case(worker.fsdp2, {"dropout": 0.3}),
    **{
        f"{run.__name__}-{kind}": Case(run, {"kind": kind}, whens=BEFORE)
        for run in (worker.ddp, worker.fsdp2)
        for kind in ("dora", "lora-bias", "two-adapters")
    },
    "fsdp2-each-lora-layer": Case(  # sharded until its own call
        worker.fsdp2, {"units": "lora-layers"}, coverage=("coverage",)
    ),
    "fsdp2-loaded-last": Case(worker.fsdp2_from_meta),
    "fsdp2-cpu-offload": Case(  # there is nothing to pin for
        worker.fsdp2, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    ),
    **{  # every layer runs twice, with the same masks
        f"fsdp2-{how}-checkpoints-p{p}": Case(
            worker.fsdp2_checkpointed, {"how": how, "dropout": p}, runs=2, whens=BEFORE
        )
        for how in ("reentrant", "non-reentrant", "wrapper")
        for p in (0.0, 0.3)
    },
    "fsdp2-compiled-blocks": Case(worker.fsdp2_compiled, whens=BEFORE, coverage=()),
    "fsdp2-sharded-and-replicated": Case(worker.hsdp, ranks=4),
    "fsdp1": Case(worker.fsdp1),
    "fsdp1-dropout": Case(worker.fsdp1, {"dropout": 0.3}, whens=BEFORE),
    # No hook is on what a leaf contains, and all of it is whole in its forward.
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


# The base's layers have biases in attention alone.
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@cases(FAST_CASES)
def test_each_layer_runs_fast(case, when, pools):
    """The ranks have the same random state, and so the same masks."""
    records = pools(case.ranks).run(case.run, when, **case.settings)
    kind, p = case.settings.get("kind", "lora"), case.settings.get("dropout", 0.0)
    assert_same(records, alone(2 if p else 1, kind, p), case.runs * FAST)
    for record in records:
        for moment in case.coverage:
            found = getattr(record, moment)
            assert len(found.layers) == LAYERS
            assert len(found.fast) == LAYERS or (moment == "coverage" and not found.eager)


HOOKED = "its base layer is sharded, and gathers or splits what it is called with (DTensor)"
GATHERED = "DeepSpeed ZeRO-3 gathers its base layer when it is called"
LEFT_TO_PEFT = {
    "fsdp2-base-layers": Case(worker.fsdp2, {"units": "base-layers"}, reason=HOOKED),
    "fsdp2-adapters": Case(worker.fsdp2, {"units": "adapters"}, coverage=()),
    # By PEFT's policy, which wraps each module that trains.
    "fsdp1-adapters": Case(worker.fsdp1, {"units": "adapters"}, coverage=()),
    "zero3": Case(worker.zero3, reason=GATHERED),
    "zero3-adapters-persist": Case(worker.zero3, {"persists": 200}, reason=GATHERED),
    "tensor-parallel": Case(worker.torch_tensor_parallel, reason=HOOKED),
    "tensor-parallel-fsdp2": Case(worker.tensor_parallel_and_fsdp2, ranks=4, reason=HOOKED),
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
def test_each_layer_is_left_to_peft(case, when, pools):
    assert_left_to_peft(pools(case.ranks).run(case.run, when, **case.settings), case)


def test_transformers_tensor_parallel_is_left_to_peft(two, tmp_path):
    training.base_model().save_pretrained(tmp_path)
    case = Case(worker.transformers_tensor_parallel, reason=HOOKED)
    assert_left_to_peft(two.run(case.run, "after", str(tmp_path)), case)


@before_and_after
def test_distributed_tensors_are_left_to_peft(two, when):
    for fast, error in two.run(worker.distributed_tensors, when):
        assert fast == 0
        assert error < TOLERANCE


@before_and_after
def test_fsdp2_in_evaluation(two, when):
    for fast, error in two.run(worker.fsdp2_evaluated, when):
        assert fast == LAYERS
        assert error < TOLERANCE


@before_and_after
def test_fsdp2_in_bfloat16(two, when):
    """PEFT under the same policy rounds elsewhere: each is 0.06 from float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    expected = two.run(worker.fsdp2, "never", mp_policy=policy)
    records = two.run(worker.fsdp2, when, mp_policy=policy)
    for record, peft in zip(records, expected, strict=True):  # each has losses of its own
        assert_same([record], peft, FAST, tolerance=0.1)


@before_and_after
def test_restore_of_layers_that_fsdp2_shards_one_by_one(two, when):
    calls, records, bases = zip(*two.run(worker.fsdp2_restored, when), strict=True)
    assert calls == (LAYERS, LAYERS)
    assert_same(records, alone(), fast=0)
    assert bases == ([FSDPModule, PeftLinear],) * 2


def test_restore_of_layers_that_are_replicated_one_by_one(two):
    module = "torch.distributed._composable.replicate_with_fsdp"
    pytest.importorskip(module, reason="newer than torch 2.8")
    for before, restored in two.run(worker.replicated_and_restored):
        assert before == restored


def test_check_finds_a_wrong_gradient_that_is_a_view_of_ddp_s_bucket(two):
    assert [verdict for verdict, _ in two.run(worker.ddp_checked, broken=True)] == [False, False]


def test_check_keeps_gradients_that_are_views_of_ddp_s_buckets(two):
    assert two.run(worker.ddp_checked, broken=False) == [(True, 0.0)] * 2


def test_check_of_an_fsdp2_model(two):
    for text in two.run(worker.fsdp2_checked):
        assert (
            f"(0 of {LAYERS} layers fast, {LAYERS} sharded) and PEFT: the same within rounding"
            in text
        )


def test_zero3_gathers_what_it_gathers_for_peft(two):
    """Looking whether a call can be fast reads no weight: that would gather it."""
    expected = two.run(worker.zero3, "never")[0].external
    assert {record.external for record in two.run(worker.zero3, "before")} == {expected}


# Of many adapters, and of own models' experts: the same gradients as of the whole batch.
TOGETHER = {
    "peft": (mixed.mixed_peft, {"find_unused_parameters": True}),
    # Each rank names every adapter that trains, but in other samples.
    "peft-all-named": (mixed.mixed_peft, {"names": [*"pqsttspt" "qp"]}),
    "peft-bucket-view": (
        mixed.mixed_peft, {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ),
    "banks": (mixed.mixed_rows, {"banks": True}),
    "lists": (mixed.mixed_rows, {"banks": False}),
    "lists-find-unused": (mixed.mixed_rows, {"banks": False, "find_unused_parameters": True}),
    "experts": (mixed.experts, {}),
    "experts-fsdp2": (mixed.experts, {"engine": "fsdp2"}),
}  # fmt: skip


@pytest.mark.parametrize(("run", "settings"), TOGETHER.values(), ids=TOGETHER)
def test_ranks_together_have_the_gradients_of_the_whole_batch(run, settings, two):
    """Also of an adapter without rows on a rank, or on both."""
    of_one = {k: v for k, v in settings.items() if k in ("names", "banks")}
    expected = run(1, **of_one)
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    for found in two.run(run, 2, **settings):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            pair = found[name], value
            if any(
                gradient is None for gradient in pair
            ):  # DDP gives zeros where autograd has none
                assert not any(gradient is not None and gradient.any() for gradient in pair), name
            else:
                torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6, msg=name)
