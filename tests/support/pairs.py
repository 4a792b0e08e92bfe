"""Not every combination of some parameters, but every two values of any two of them."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of indices in which every two values of any two axes meet; always the same ones.

    Each row is the one of all combinations that has the most pairs which no row before it has.
    """
    axes = [*combinations(range(len(sizes)), 2)]

    def pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, row[a], b, row[b]) for a, b in axes}

    left = {row: pairs(row) for row in product(*map(range, sizes))}
    missing, rows = set().union(*left.values()), []
    while missing:
        row = max(left, key=lambda each: len(left[each] & missing))
        missing -= left.pop(row)
        rows.append(row)
    return rows


def pairwise(axes: Mapping[str, Mapping[str, Any] | Sequence[Any]]) -> pytest.MarkDecorator:
    """``parametrize`` for ``axes``: the values of each by their ids, or a list of plain values.

    An axis may be of several names, ``"n,k"``, and its values then are tuples.
    """
    named = [
        [*values.items()] if isinstance(values, Mapping) else [(f"{name}{v}", v) for v in values]
        for name, values in axes.items()
    ]
    rows, ids = [], []
    for row in covering([len(values) for values in named]):
        chosen = [values[i] for values, i in zip(named, row, strict=True)]
        rows.append(
            [
                part
                for name, (_, value) in zip(axes, chosen, strict=True)
                for part in (value if "," in name else (value,))
            ]
        )
        ids.append("-".join(each for each, _ in chosen if each))
    return pytest.mark.parametrize(",".join(axes), rows, ids=ids)
