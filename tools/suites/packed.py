"""PEFT's tests without the hub and a GPU: also those of packed weights, with LoRA among them."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from .selection import is_packed


class EveryModel(dict):
    """Reports every model as fetched, so that PEFT's tests look only in the cache."""

    def __contains__(self, name) -> bool:
        return True

    def __missing__(self, name) -> int:
        return 1


def prepare() -> None:
    """Before PEFT's tests are collected: also collect files for GPUs, and add LoRA."""
    from accelerate.test_utils import testing

    import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = EveryModel()
    # A file for GPUs skips itself if this is "cpu".
    testing.get_backend = lambda: ("cpu:0", 1, lambda: 0)
    if find_spec("bitsandbytes"):
        from bitsandbytes.nn import modules

        # On such a CPU, a call in evaluation repacks a weight, which PEFT then misreads (DoRA).
        modules.has_avx512bf16 = lambda: False
    if Path("tests", "test_quantization.py").is_file():
        add_lora(import_module("tests.test_quantization"))


def add_lora(matrix) -> None:
    """Add LoRA to their matrix of methods and packed weights."""
    from peft import LoraConfig

    settings = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    matrix.TEST_CASES += [(LoraConfig, settings), (LoraConfig, settings | {"use_dora": True})]


def need_no_gpu(items: list[pytest.Item]) -> None:
    """Remove the marks that skip tests of packed weights without a GPU."""
    for item in items:
        if is_packed(item.nodeid):
            for node in item.listchain():
                node.own_markers[:] = [mark for mark in node.own_markers if not asks_for_gpu(mark)]


def asks_for_gpu(mark: pytest.Mark) -> bool:
    """Whether this mark skips a test without a GPU; marks for several GPUs stay."""
    reason = mark.kwargs.get("reason", "")
    return mark.name == "skipif" and any(
        words in reason for words in ("requires GPU", "requires a GPU", "requires a hardware")
    )
