"""Pairwise coverage: the rows that represent a product of parameters."""

from itertools import combinations, product

import pytest
from marks import covering, pairwise


@pytest.mark.parametrize("sizes", [(6, 9, 2, 2), (3, 3, 2), (4, 1, 5), (2, 2, 2, 2, 2), (3, 4)])
def test_every_two_values_meet(sizes):
    rows = covering(sizes)
    for a, b in combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == {*product(range(sizes[a]), range(sizes[b]))}
    assert len(rows) == len({*rows}) <= 1.5 * max(a * b for a, b in combinations(sizes, 2))


def test_values_and_ids_keep_their_order():
    mark = pairwise({"n,k": {"small": (1, 2)}, "p": [0.5], "bias": {"": False, "bias": True}})
    assert mark.args == ("n,k,p,bias", [[1, 2, 0.5, False], [1, 2, 0.5, True]])
    assert mark.kwargs == {"ids": ["small-p0.5", "small-p0.5-bias"]}
