"""Tests that fail with an older package than today's, for a reason of that package: skipped."""

from importlib.metadata import version

import pytest
from packaging.version import Version

# The package, the first version that passes (as far as tried), part of the test's id, and why.
OLDER = (
    ("transformers", "5", "test_in_ddp_one_rank_writes", "Trainer can't resume in DDP on CPUs"),
    ("transformers", "5", "blocks_of_a_compiled_model", "activation_checkpointing_enable is new"),
    ("transformers", "5", "blocks_run_fast_twice", "a block that runs again rounds otherwise"),
    ("transformers", "5", "wrapper-checkpoints-before", "the block made again is another"),
    ("transformers", "5", "test_a_layer_may_get_the_rows", "its experts are routed, an error"),
    ("transformers", "5", "mxfp4_of_bytes_is_transformers[torch.float16", "NaN for what overflows"),
    ("peft", "0.21", "test_an_adapter_is_swapped_in_a_c", "hotswap has the first one's shapes"),
    ("peft", "0.21", "test_what_isn_t_covered", "no trained tokens for a tied head"),
    ("peft", "0.21", "test_variants_are_peft_s[mica]", "mica is new"),
    ("torch", "2.13", "test_check_of_a_compiled_model", "the compiler and PEFT's hooks"),
    ("torch", "2.12", "test_compile.py::test_a_compiled_model", "the compiler and PEFT's hooks"),
    ("torch", "2.12", "test_optimized_after_compiling", "the compiler and PEFT's hooks"),
    ("torch", "2.12", "one_process[bytes-", "FSDP2 has no frozen bytes"),
    ("torch", "2.11", "test_an_import_compiles_nothing_again", "the compiler and PEFT's hooks"),
    ("torch", "2.11", "test_dtypes_of_x_and_autocast", "PEFT's dx lacks the adapter's part"),
    ("torch", "2.11", "tensor-parallel-before", "PEFT's tensor parallel layers train otherwise"),
    ("torch", "2.11", "whole_graph_it_needs_a_setting", "it says so in other words"),
)  # fmt: skip


MINE = [row for row in OLDER if Version(version(row[0])) < Version(row[1])]


def pytest_itemcollected(item: pytest.Item) -> None:
    for package, first, part, why in MINE:
        if part in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=f"before {package} {first}: {why}"))
