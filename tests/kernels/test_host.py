"""The host side of launches on an H100, tested without a GPU: a stand-in replaces the driver.

Everything above the driver is real: launchers, Triton's binder, tensor maps, C launcher.
"""

import json
from pathlib import Path

import pytest
from process import run_without_interpreter

WORKER = Path(__file__).parents[1] / "support" / "host_worker.py"
KERNELS = (
    "project", "gemm_lowrank", "gemm_lowrank_few_rows", "lowrank", "weight_grad", "sum_planes",
)  # fmt: skip
# For a forward and a backward: the launches of each kernel, and the number of tensor maps.
LAUNCHES = {
    "in-place": (1, 0, 0, 1, 2, 3, 0),
    "in-place-long": (1, 0, 0, 2, 2, 3, 0),
    "in-place-dropout": (1, 0, 0, 2, 2, 3, 0),
    "fused-few-rows": (0, 1, 1, 0, 2, 1, 6),
    "fused": (1, 2, 0, 0, 2, 3, 6),
    "fused-dropout": (1, 2, 0, 0, 2, 3, 6),
    "default": (1, 2, 0, 0, 2, 3, 6),
    "qkv-in-place": (1, 0, 0, 4, 4, 5, 0),
    "qkv-fused-dropout": (1, 4, 0, 0, 4, 5, 16),
}
MOST_VARIANTS = 8


@pytest.fixture(scope="module")
def found() -> dict:
    """The worker's results, by the names of its functions."""
    found = json.loads(run_without_interpreter(WORKER))
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found


def test_a_replay_passes_the_same_arguments_as_an_ordinary_launch(found):
    assert found["replays"]["compared"] > 130
    assert found["replays"]["differences"] == []


def test_kernels_of_captured_calls_stay_loaded(found):
    assert found["unloaded"] == []


def launched(counts: dict) -> tuple[int, ...]:
    found = [counts.pop(f"{name}_kernel", 0) for name in KERNELS]
    found.append(counts.pop("tensor maps"))
    assert not counts
    return tuple(found)


@pytest.mark.parametrize("layer", LAUNCHES)
def test_the_number_of_launches_of_a_layer(layer, found):
    assert launched(found["standard_layers"][layer]) == LAUNCHES[layer]


@pytest.mark.parametrize("call", ["plain", "all"])
def test_experts_launch_like_a_layer_and_replays_pass_the_same_arguments(call, found):
    """A weight's tensor map is 3D.  y and dx have no map, because their tiles end at any row."""
    assert launched(found["experts"][call]["launches"]) == (1, 2, 0, 0, 2, 1, 4)
    assert found["experts"][call]["differences"] == []


@pytest.mark.parametrize(
    "layer", ["IN_PLACE 0.0", "IN_PLACE 0.1", "FUSED 0.0", "FUSED 0.1", "experts"]
)
def test_few_kernels_compile_over_batches_of_all_lengths(layer, found):
    assert 0 < found["variants"][layer] <= MOST_VARIANTS


def test_the_benchmark_of_the_host_counts_launches_and_models_their_time(found):
    row = found["benchmark"]
    assert row["kernels"]["frozen"] == [2, 0]  # torch's kernels for y and dx; none of Triton's
    for name, launches in row["kernels"].items():  # torch's and Triton's cost the same
        driver = row["seconds"]["modeled"][name] - row["seconds"]["both"][name]
        assert driver == pytest.approx(3e-6 * sum(launches), abs=1e-7)
    targets = [(target["quantity"], target["ratio"]) for target in row["targets"]]
    assert targets == [("modeled", "fastlora/peft")]
