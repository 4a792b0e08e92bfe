"""The record of sorted rows: where each segment's are, on the host and on the device."""

import pytest
import torch

from fastlora.projection import Adapter, Base, Output
from fastlora.rows import Rows


def segments(*ends: int) -> Rows:
    return Rows(torch.tensor(ends, dtype=torch.int32))


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
    found = segments(*ends).shares_of(rows)
    for e, items, place in found:
        assert items == place
        assert owners[place] == [e] * (place.stop - place.start)
        assert owners[place]
    counts = [place.stop - place.start for _, _, place in found]
    assert sum(counts) == len(owners) - owners.count(len(ends))


@pytest.mark.parametrize("ends", [(3, 2), (-1, 2), (2, 6), (6, 6), (-2, -1)], ids=str)
def test_ends_that_can_t_be(ends):
    with pytest.raises(ValueError, match=r"offsets are .*none above 5, the rows of x"):
        segments(*ends).shares_of(5)


def test_parts_are_views():
    weight, bias = torch.randn(3, 4, 5), torch.randn(3, 4)
    adapter = Adapter(torch.randn(3, 2, 5), torch.randn(3, 4, 2), 0.5)
    output = Output(Base(weight, bias), (adapter,))
    for e, part in enumerate(segments(1, 2, 3).part(output, e) for e in range(3)):
        assert torch.equal(part.base.weight, weight[e])
        assert torch.equal(part.base.bias, bias[e])
        assert part.adapters[0].scale == 0.5
        assert torch.equal(part.adapters[0].lora_b, adapter.lora_b[e])
        assert part.base.weight._base is weight
    assert segments(1, 2, 3).part(Output(Base(weight)), 0).base.bias is None
