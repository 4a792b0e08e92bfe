"""The table of counted bytes: what fastlora's launches state, and its peers' passes."""

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/counted_bytes.py"


@pytest.fixture(scope="module")
def counted():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("counted_bytes", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["p0", "p0.1"])
def test_two_launches_forward_three_backward(counted, dropout):
    """Forward: x, W, y and x again.  Backward: dy, dy, W, dx and x.  All else is small."""
    shape = counted.Shape()
    found = counted.bytes_of_fastlora(shape, counted.FUSED, dropout=dropout)
    whole, small = shape.M * shape.K * 2, shape.K * shape.r * 2
    weight, h = shape.N * shape.K * 2, shape.M * shape.r * 2
    seeds = 8 if dropout else 0
    assert found.forward == 3 * whole + weight + 2 * (small + h) + seeds
    # lora_b, h, d lora_b, dh; dh, lora_a; dh, d lora_a
    backward = 4 * whole + weight + 4 * small + 4 * h + 2 * seeds
    assert found.backward - found.partial == backward


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["p0", "p0.1"])
def test_partial_sums_are_a_few_percent(counted, dropout):
    found = counted.bytes_of_fastlora(counted.Shape(), counted.FUSED, dropout=dropout)
    assert 0 < found.partial <= 0.032 * (found.both - found.partial)


def test_at_rank_64_dy_is_read_twice_for_want_of_cheap_partial_sums(counted):
    """They grow with the rank: to write and to read them would be as many bytes as dy."""
    shape = counted.Shape(r=64)
    found = counted.bytes_of_fastlora(shape, counted.FUSED)
    whole, small, h = shape.M * shape.K * 2, shape.K * shape.r * 2, shape.M * shape.r * 2
    one_pass = 4 * whole + shape.N * shape.K * 2 + 4 * (small + h)
    assert (found.partial, found.backward) == (0, one_pass + whole)


def test_float32_adapters_cost_their_own_bytes_only(counted):
    shape = counted.Shape()
    same = counted.bytes_of_fastlora(shape, counted.FUSED)
    wider = counted.bytes_of_fastlora(shape, counted.FUSED, adapter_dtype=torch.float32)
    adapters = shape.r * (shape.N + shape.K) * 2
    # d lora_b comes from float32 partial sums either way.
    assert wider.forward - same.forward == adapters
    assert wider.backward - same.backward == 2 * adapters


def test_in_place_reads_and_writes_y_and_dx_once_more(counted):
    shape = counted.Shape()
    fused = counted.bytes_of_fastlora(shape, counted.FUSED)
    in_place = counted.bytes_of_fastlora(shape, counted.IN_PLACE)
    assert in_place.forward - fused.forward == 2 * shape.M * shape.N * 2
    assert in_place.backward - fused.backward == 2 * shape.M * shape.K * 2


def test_a_group_reads_x_once_and_writes_dx_once(counted):
    shape, n = counted.Shape(), 3
    group = counted.bytes_of_fastlora(shape, counted.FUSED, projections=n)
    one = counted.bytes_of_fastlora(shape, counted.FUSED)
    whole = shape.M * shape.K * 2
    assert n * one.forward - group.forward == (n - 1) * whole
    assert n * one.backward - group.backward == (n - 1) * 2 * whole


@pytest.mark.parametrize(
    ("peer", "forward", "backward", "over_frozen"),
    [
        ("floor: all inputs and results once", 160, 224.5, 1.20),
        ("LoRAFusion, dropout", 385, 323, 2.21),
        ("Unsloth, no dropout", 353, 610, 3.01),
        ("axolotl, no dropout", 353, 546, 2.81),
        ("axolotl, dropout", 513, 962, 4.61),
        ("PEFT, no dropout", 609, 738, 4.21),
        ("PEFT, dropout", 769, 898, 5.21),
        ("PEFT, float32 adapters, dropout", 1664, 1984, 11.41),
    ],
)
def test_peers_passes_add_up_to_the_published_model(counted, peer, forward, backward, over_frozen):
    """MiB from closed formulas without their smallest terms; a missed matrix is 32 MiB or more."""
    row = counted.rows_of_one(counted.Shape())[peer]
    assert row.forward / counted.MIB == pytest.approx(forward, abs=1, rel=2e-3)
    assert row.backward / counted.MIB == pytest.approx(backward, abs=1, rel=2e-3)
    assert row.both / (320 * counted.MIB) == pytest.approx(over_frozen, abs=0.01)


def test_unsloths_order_of_q_k_v(counted):
    row = counted.rows_of_group(counted.Shape())["Unsloth q, k, v, no dropout"]
    assert row.forward / counted.MIB == pytest.approx(1056, rel=5e-3)
    assert row.backward / counted.MIB == pytest.approx(1950, rel=5e-3)
