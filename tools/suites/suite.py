"""The suites: which tests of which project run, and on which models."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import models, packed, selection, zen
from .models import Adapter, Model


@dataclass(frozen=True)
class Suite:
    """The tests of one project.

    Its patterns of files are relative to its folder tests/.  ``parts`` are copied from its source;
    the tested package is in ``package``, or installed if that is empty.
    """

    title: str
    files: tuple[str, ...]
    is_chosen: Callable[[str], bool]
    models: dict[str, Model]
    parts: tuple[str, ...]
    package: str
    version_file: str
    settings: dict[str, Any] = field(default_factory=dict)  # of fastlora.auto
    before: Callable[[], None] = lambda: None  # called before the tests are collected
    quick: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    pipelines: tuple[str, ...] = ()


def names_lora(test: str) -> bool:
    """Whether a test names LoRA or PEFT, by its id in pytest."""
    return bool(re.search("peft|lora", test.rpartition("::")[2], re.IGNORECASE))


def needs_no_hub(test: str) -> bool:
    """Whether a test of diffusers works with tiny models alone, by its id in pytest."""
    return "IntegrationTests" not in test and "SlowTests" not in test


SUITES = {
    "peft": Suite(
        "PEFT",
        files=selection.FILES,
        is_chosen=selection.is_chosen,
        models=models.OF_PEFT,
        parts=("tests",),
        package="",
        version_file="src/peft/__init__.py",
        before=packed.prepare,
        quick=selection.QUICK,
        left_out=selection.LEFT_OUT | selection.TESTS_LEFT_OUT,
        adapters=models.ADAPTERS,
        pipelines=models.PIPELINES,
    ),
    "trl": Suite(
        "TRL",
        files=("test_*_trainer.py", "test_activation_offloading.py", "experimental/test_*.py"),
        is_chosen=names_lora,
        models=models.OF_TRL,
        parts=("tests", "trl", "scripts"),
        package=".",
        version_file="VERSION",
        settings={"loss": True},
        before=zen.replace_load_dataset,
    ),
    "diffusers": Suite(
        "diffusers",
        files=tuple(f"lora/test_lora_layers_{name}.py" for name in ("sd", "sdxl", "sd3", "flux")),
        is_chosen=needs_no_hub,
        models=models.OF_DIFFUSERS,
        parts=("tests", "src"),
        package="src",
        version_file="src/diffusers/__init__.py",
        settings={"loss": True},
    ),
}
