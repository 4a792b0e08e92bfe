"""The table of counted bytes: what fastlora's launches state, and its peers' passes."""

import pytest
import torch

from benchmarks.counted_bytes import (
    EXPERT_ROWS,
    EXPERTS,
    FUSED,
    Shape,
    bytes_of_fastlora,
    counted,
)
from fastlora.formats.bitsandbytes import FourBit
from fastlora.formats.format import Quantised
from fastlora.kernels.plan import UNPACKING


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["p0", "p0.1"])
def test_two_launches_forward_three_backward(dropout):
    """Forward: x, W, y and x again.  Backward: dy, dy, W, dx and x.  All else is small."""
    shape = Shape()
    found = bytes_of_fastlora(shape, FUSED, dropout=dropout)
    whole, small = shape.M * shape.K * 2, shape.K * shape.r * 2
    weight, h = shape.N * shape.K * 2, shape.M * shape.r * 2
    seeds = 8 if dropout else 0
    assert found.forward == 3 * whole + weight + 2 * (small + h) + seeds
    # lora_b, h, d lora_b, dh; dh, lora_a; dh, d lora_a
    backward = 4 * whole + weight + 4 * small + 4 * h + 2 * seeds
    assert found.backward - found.partial == backward
    assert 0 < found.partial <= 0.04 * (found.both - found.partial)


@pytest.mark.parametrize("name", [name for name in EXPERT_ROWS if "fastlora" in name])
def test_experts_move_at_most_a_quarter_more_than_frozen_ones(name):
    frozen, ours = (
        counted(EXPERT_ROWS["frozen experts"], EXPERTS),
        counted(EXPERT_ROWS[name], EXPERTS),
    )
    assert ours.both <= 1.25 * frozen.both


@pytest.mark.parametrize(("M", "plan"), [(16, UNPACKING), (64, UNPACKING), (8192, FUSED)])
def test_a_packed_weight_is_read_once_and_made_dense_only_for_many_rows(M, plan):
    """In each direction; what was made dense is then read in the dense weight's place."""
    shape = Shape(M=M)
    count = shape.N * shape.K
    tensors = (
        torch.empty(count // 2, dtype=torch.uint8, device="meta"),
        torch.empty(count // 64, dtype=torch.uint8, device="meta"),
        *(torch.empty(size, device="meta") for size in ((count // 2**14,), (256,), ())),
    )
    packed = Quantised(FourBit(shape.N, shape.K, "nf4", 64, 256), tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    found, dense = (
        bytes_of_fastlora(shape, p, packed=w) for p, w in ((plan, packed), (FUSED, None))
    )
    weight = 2 * count
    more = size - weight if plan is UNPACKING else size + weight
    assert found.forward - dense.forward == more
    assert found.backward - dense.backward == more
