"""The record of sorted rows: where each segment's are, on the host and on the device."""

import pytest
import torch

from fastlora.projection import Adapter, Base, Output
from fastlora.segments import Segments, parts_of


def segments(*ends: int) -> Segments:
    return Segments(torch.tensor(ends, dtype=torch.int32))


@pytest.mark.parametrize(
    ("ends", "rows", "owners"),
    [
        ((2, 2, 5), 7, [0, 0, 2, 2, 2, 3, 3]),
        ((0, 0, 3), 3, [2, 2, 2]),
        ((0,), 2, [1, 1]),
        ((0, 0), 0, []),
        ((4,), 4, [0, 0, 0, 0]),
    ],
)
def test_slices_and_owners_agree(ends, rows, owners):
    assert segments(*ends).of_rows(rows).tolist() == owners
    slices = segments(*ends).slices(rows)
    for e, some in enumerate(slices):
        assert owners[some] == [e] * (some.stop - some.start)
    assert sum(some.stop - some.start for some in slices) == len(owners) - owners.count(len(ends))


@pytest.mark.parametrize("ends", [(3, 2), (-1, 2), (2, 6), (6, 6), (-2, -1)], ids=str)
def test_ends_that_can_t_be(ends):
    with pytest.raises(ValueError, match=r"offsets are .*none above 5, the rows of x"):
        segments(*ends).slices(5)


def test_parts_are_views():
    weight, bias = torch.randn(3, 4, 5), torch.randn(3, 4)
    adapter = Adapter(torch.randn(3, 2, 5), torch.randn(3, 4, 2), 0.5)
    parts = parts_of(Output(Base(weight, bias), (adapter,)))
    assert len(parts) == 3
    for e, part in enumerate(parts):
        assert torch.equal(part.base.weight, weight[e])
        assert torch.equal(part.base.bias, bias[e])
        assert part.adapters[0].scale == 0.5
        assert torch.equal(part.adapters[0].lora_b, adapter.lora_b[e])
        assert part.base.weight._base is weight
    assert parts_of(Output(Base(weight), (adapter,)))[0].base.bias is None
