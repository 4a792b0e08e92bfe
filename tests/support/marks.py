"""The device of the tests, skips with older packages, and pairwise parametrization."""

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from itertools import combinations, product
from types import FunctionType
from typing import Any

import pytest
import torch
from packaging.version import Version

# Kernels run on the GPU if there is one, else interpreted on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # Triton reads it when the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

_EQUAL_BITS = re.compile(r"\bequal\b|\brtol=0\b(?!\.)")


@cache
def wants_equal_bits(function: Callable) -> bool:
    """Whether a test requires equal bits of two computations, which may depend on the CPU's BLAS.

    It looks at the test's source, and at the source of functions that it calls in its file.
    """
    if _EQUAL_BITS.search(inspect.getsource(function)):
        return True
    helpers = (function.__globals__.get(name) for name in function.__code__.co_names)
    return any(
        isinstance(helper, FunctionType)
        and helper.__module__ == function.__module__
        and helper is not function
        and wants_equal_bits(helper)
        for helper in helpers
    )


# Tests that are skipped with an older package, because that package fails them.  Columns: package,
# the first version that passes (as far as tried), a part of the test's id, and the reason.
OLDER = (
    ("transformers", "5", "test_in_ddp_one_rank_writes", "Trainer can't resume in DDP on CPUs"),
    ("transformers", "5", "blocks_of_a_compiled_model", "no activation_checkpointing_enable"),
    ("transformers", "5", "blocks_run_fast_twice", "a recomputed block rounds differently"),
    ("transformers", "5", "wrapper-checkpoints-before", "a recomputed block differs"),
    ("transformers", "5", "test_a_layer_may_get_the_rows", "shared experts get routed rows only"),
    ("transformers", "5", "mxfp4_of_bytes_is_transformers[torch.float16", "gives NaN on overflow"),
    ("peft", "0.21", "test_an_adapter_is_swapped_in_a_c", "hotswap keeps the first shapes"),
    ("peft", "0.21", "test_what_isn_t_covered", "a tied head can't train tokens"),
    ("peft", "0.21", "test_variants_are_peft_s[mica]", "has no mica"),
    ("peft", "0.19", "peft_s_forward[add_another]", "has one adapter with target_parameters"),
    ("peft", "0.19", "test_dora_caches_are_used", "has no DoraCaching"),
    ("torch", "2.13", "test_check_of_a_compiled_model", "can't compile PEFT's hooks"),
    ("torch", "2.12", "test_compile.py::test_a_compiled_model", "can't compile PEFT's hooks"),
    ("torch", "2.12", "one_process[bytes-", "FSDP2 can't shard frozen bytes"),
    ("torch", "2.11", "test_an_import_compiles_nothing_again", "can't compile PEFT's hooks"),
    ("torch", "2.11", "test_dtypes_of_x_and_autocast", "PEFT's dx lacks the adapter's part"),
    ("torch", "2.11", "tensor-parallel-before", "tensor-parallel layers train differently"),
    ("torch", "2.11", "whole_graph_it_needs_a_setting", "the error message differs"),
)  # fmt: skip

# The rows for which the installed package is older.
OLDER_HERE = [row for row in OLDER if Version(version(row[0])) < Version(row[1])]


def pytest_itemcollected(item: pytest.Item) -> None:
    for package, first, part, why in OLDER_HERE:
        if part in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=f"before {package} {first}: {why}"))


def covering(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Pairwise coverage of axes with these numbers of values, as rows with an index for each axis.

    Every two values of any two axes occur together in some row, but not every combination of all
    axes does.  Each step takes the combination that has the most pairs still missing, so the result
    is deterministic.
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


def pairwise(
    axes: Mapping[str, Mapping[str, Any] | Sequence[Any]], **options: Any
) -> pytest.MarkDecorator:
    """Parametrize a test over ``axes`` with pairwise coverage.

    ``axes`` maps a name to its values: a dict from id to value, or a list of plain values.  A name
    may be several names, ``"n,k"``; its values are then tuples.  ``options`` are passed to
    ``parametrize``.
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
    return pytest.mark.parametrize(",".join(axes), rows, ids=ids, **options)
