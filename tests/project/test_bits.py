"""Which tests ``-m bits`` picks."""

import pytest
import torch
from bits import wants_equal_bits


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


@pytest.mark.parametrize("function", [by_itself, by_a_tolerance_of_nothing, by_a_helper])
def test_a_test_that_wants_equal_bits(function):
    assert wants_equal_bits(function)


@pytest.mark.parametrize("function", [within_rounding, again])
def test_a_test_that_leaves_room(function):
    assert not wants_equal_bits(function)
