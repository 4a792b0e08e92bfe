"""The host's side of launches on an H100, without one: a stand-in for its driver launches nothing.

Everything above the driver runs for real: launchers, Triton's binder, tensor maps, C launcher.
"""

import json
from pathlib import Path

import pytest
from process import run_without_interpreter

WORKER = Path(__file__).parents[1] / "support" / "host_worker.py"
KERNELS = ("project", "gemm_lowrank", "lowrank", "weight_grad", "sum_planes")
# Of each, and tensor maps: of a forward and a backward.
LAUNCHES = {
    "in-place": (1, 0, 1, 2, 3, 0),
    "in-place-long": (1, 0, 2, 2, 3, 0),
    "in-place-dropout": (1, 0, 2, 2, 3, 0),
    "fused-few-rows": (0, 2, 0, 2, 1, 6),
    "fused": (1, 2, 0, 2, 3, 6),
    "fused-dropout": (1, 2, 0, 2, 3, 6),
    "default": (1, 2, 0, 2, 3, 6),
    "qkv-in-place": (1, 0, 4, 4, 5, 0),
    "qkv-fused-dropout": (1, 4, 0, 4, 5, 16),
}
MOST_VARIANTS = 8


@pytest.fixture(scope="module")
def found() -> dict:
    """What the worker prints, by the name of its functions."""
    found = json.loads(run_without_interpreter(WORKER))
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found


def test_a_replay_hands_over_what_an_ordinary_launch_does(found):
    assert found["replays"]["compared"] > 200
    assert found["replays"]["differences"] == []


def test_kernels_of_a_captured_call_stay_loaded(found):
    assert found["unloaded"] == []


def launched(counts: dict) -> tuple[int, ...]:
    found = [counts.pop(f"{name}_kernel", 0) for name in KERNELS]
    found.append(counts.pop("tensor maps"))
    assert not counts
    return tuple(found)


@pytest.mark.parametrize("layer", LAUNCHES)
def test_a_layer_launches_as_often_as_it_did(layer, found):
    assert launched(found["standard_layers"][layer]) == LAUNCHES[layer]


@pytest.mark.parametrize("call", ["plain", "all"])
def test_experts_launch_as_a_layer_does_and_replays_hand_over_the_same(call, found):
    """Of a weight the map has three dimensions; y and dx, whose tiles end anywhere, have none."""
    assert launched(found["experts"][call]["launches"]) == (1, 2, 0, 2, 1, 4)
    assert found["experts"][call]["differences"] == []


@pytest.mark.parametrize(
    "layer", ["IN_PLACE 0.0", "IN_PLACE 0.1", "FUSED 0.0", "FUSED 0.1", "experts"]
)
def test_few_kernels_compile_over_batches_of_all_lengths(layer, found):
    assert 0 < found["variants"][layer] <= MOST_VARIANTS
