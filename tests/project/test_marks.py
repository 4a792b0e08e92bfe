"""Marks: the rows that stand for a product of parameters, and which tests ``-m bits`` picks."""

from itertools import combinations, product

import pytest
import torch
from marks import covering, pairwise, wants_equal_bits


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


def by_itself():
    assert all(map(torch.equal, [], []))


def by_a_tolerance_of_nothing():
    torch.testing.assert_close(1.0, 1.0, rtol=0, atol=0)


def by_a_helper():
    by_itself()


def within_rounding():
    torch.testing.assert_close(1.0, 1.0, rtol=0.1, atol=0)


def again():
    return again


def test_who_wants_equal_bits():
    for function in (by_itself, by_a_tolerance_of_nothing, by_a_helper):
        assert wants_equal_bits(function)
    for function in (within_rounding, again):
        assert not wants_equal_bits(function)
