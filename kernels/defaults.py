"""The choice of a config: tables for every architecture, and what tuning may try instead."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

from .config import (
    Call,
    Config,
    GemmConfig,
    ProjectConfig,
    WeightGradConfig,
    partial_sums,
    power_of_two,
    tiles,
    why_not,
)
from .target import Target

# From large tiles to small.  No GPU has measured them yet: they compile to tensor-core instructions
# without a spill in a loop (`make compile-report`), and fill the device's memory pipes on paper.
_ADD = (  # no main loop: bound by memory, so several small programs for each processor
    GemmConfig(64, 128, 32, warps=8, stages=1),
    GemmConfig(64, 64, 32, warps=8, stages=1),
    GemmConfig(32, 64, 32, warps=4, stages=1),
    GemmConfig(16, 64, 32, warps=4, stages=1),
    GemmConfig(16, 32, 32, warps=4, stages=1),
)
_AMPERE_GEMM = {
    2: (
        GemmConfig(128, 128, 32, warps=8, stages=4),
        GemmConfig(128, 64, 32, warps=4, stages=4),
        GemmConfig(64, 64, 64, warps=4, stages=3),
        GemmConfig(32, 64, 64, warps=4, stages=4),
        GemmConfig(16, 64, 128, warps=4, stages=3),
        GemmConfig(16, 32, 128, warps=4, stages=4),
    ),
    4: (
        GemmConfig(128, 128, 32, warps=8, stages=2),
        GemmConfig(64, 64, 32, warps=4, stages=4),
        GemmConfig(32, 32, 32, warps=4, stages=4),
        GemmConfig(16, 32, 64, warps=4, stages=4),
    ),
    "ieee": (
        GemmConfig(64, 64, 16, warps=8, stages=3),
        GemmConfig(32, 32, 32, warps=4, stages=3),
        GemmConfig(16, 32, 32, warps=4, stages=2),
    ),
    "add": _ADD,
}
_HOPPER_GEMM = {
    2: (
        GemmConfig(128, 256, 64, warps=8, stages=3, descriptors=True),
        GemmConfig(128, 128, 64, warps=8, stages=4, descriptors=True),
        GemmConfig(128, 64, 64, warps=4, stages=4, descriptors=True),
        GemmConfig(64, 64, 64, warps=4, stages=4, descriptors=True),
        GemmConfig(32, 64, 128, warps=4, stages=4, descriptors=True),
        GemmConfig(16, 64, 128, warps=4, stages=4, descriptors=True),
        GemmConfig(16, 32, 256, warps=4, stages=4, descriptors=True),
    ),
    4: (
        GemmConfig(128, 128, 32, warps=8, stages=4, descriptors=True),
        GemmConfig(64, 64, 32, warps=4, stages=4, descriptors=True),
        GemmConfig(32, 32, 64, warps=4, stages=4, descriptors=True),
        GemmConfig(16, 32, 128, warps=4, stages=4, descriptors=True),
    ),
    "ieee": _AMPERE_GEMM["ieee"],
    "add": _ADD,
}
_AMD_GEMM = {
    2: (
        GemmConfig(128, 128, 64, warps=8, stages=2),
        GemmConfig(64, 64, 64, warps=4, stages=2),
        GemmConfig(32, 64, 64, warps=4, stages=2),
        GemmConfig(16, 64, 128, warps=4, stages=2),
    ),
    4: (
        GemmConfig(128, 64, 32, warps=8, stages=2),
        GemmConfig(64, 64, 32, warps=4, stages=2),
        GemmConfig(16, 64, 64, warps=4, stages=2),
    ),
    "ieee": (
        GemmConfig(64, 64, 32, warps=8, stages=2),
        GemmConfig(16, 32, 64, warps=4, stages=2),
    ),
    "add": _ADD,
}
_PROJECT = (
    ProjectConfig(64, 64, warps=4, stages=4),
    ProjectConfig(64, 64, warps=8, stages=4),
    ProjectConfig(32, 64, warps=4, stages=6),
    ProjectConfig(16, 128, warps=4, stages=4),
    ProjectConfig(16, 64, warps=4, stages=3),
    ProjectConfig(16, 32, warps=4, stages=3),
)
_AMD_PROJECT = (
    ProjectConfig(64, 64, warps=4, stages=2),
    ProjectConfig(16, 128, warps=4, stages=2),
    ProjectConfig(16, 64, warps=4, stages=2),
    ProjectConfig(16, 16, warps=4, stages=2),
)
_WEIGHT_GRAD = {
    2: (
        WeightGradConfig(64, 512, warps=8, stages=2),
        WeightGradConfig(64, 256, warps=8, stages=3),
        WeightGradConfig(64, 128, warps=8, stages=3),
        WeightGradConfig(128, 64, warps=4, stages=4),
        WeightGradConfig(64, 64, warps=4, stages=4),
        WeightGradConfig(128, 32, warps=4, stages=4),
        WeightGradConfig(64, 32, warps=4, stages=4),
        WeightGradConfig(32, 32, warps=4, stages=4),
    ),
    4: (
        WeightGradConfig(32, 256, warps=8, stages=3),
        WeightGradConfig(32, 128, warps=8, stages=3),
        WeightGradConfig(32, 64, warps=4, stages=4),
        WeightGradConfig(32, 32, warps=4, stages=3),
    ),
    "ieee": (
        WeightGradConfig(32, 64, warps=4, stages=3),
        WeightGradConfig(16, 32, warps=4, stages=3),
    ),
}
_AMD_WEIGHT_GRAD = {
    2: (
        WeightGradConfig(32, 256, warps=8, stages=2),
        WeightGradConfig(64, 128, warps=4, stages=2),
        WeightGradConfig(64, 64, warps=4, stages=2),
        WeightGradConfig(64, 32, warps=4, stages=2),
        WeightGradConfig(32, 32, warps=4, stages=2),
    ),
    4: (
        WeightGradConfig(64, 128, warps=4, stages=2),
        WeightGradConfig(64, 64, warps=4, stages=2),
        WeightGradConfig(32, 32, warps=4, stages=2),
    ),
}
_AMD_WEIGHT_GRAD["ieee"] = _AMD_WEIGHT_GRAD[4]
DEFAULTS: dict[tuple[str, str], Any] = {
    ("interpreter", "gemm_lowrank"): (GemmConfig(32, 32, 16, 4, 2, group=2, descriptors=True),),
    ("interpreter", "project"): (ProjectConfig(32, 32, 4, 2),),
    ("interpreter", "weight_grad"): (
        WeightGradConfig(32, 64, 4, 2),
        WeightGradConfig(32, 32, 4, 2),
    ),
}
for _names, _gemm, _project, _weight_grad in (
    (("sm_80", "sm_86", "sm_120"), _AMPERE_GEMM, _PROJECT, _WEIGHT_GRAD),
    (("sm_90", "sm_100"), _HOPPER_GEMM, _PROJECT, _WEIGHT_GRAD),
    (("gfx942", "gfx11"), _AMD_GEMM, _AMD_PROJECT, _AMD_WEIGHT_GRAD),
):
    for _name in _names:
        DEFAULTS[_name, "gemm_lowrank"] = _gemm
        DEFAULTS[_name, "project"] = _project
        DEFAULTS[_name, "weight_grad"] = _weight_grad


@lru_cache(maxsize=4096)
def chosen_config(
    kernel: str, target: Target, call: Call, config: Config | None, preferred: Config | None = None
) -> Config:
    """The config that a caller gave, else the preferred one if it fits, else the default.

    Raises ValueError with :func:`why_not`'s reason if it can't run this call.
    """
    if config is None and preferred is not None and not why_not(preferred, target, call):
        return preferred
    given = config or default_config(kernel, target, call)
    if given is None:
        given = _rows(DEFAULTS[target.name, kernel], call)[-1]
    reason = why_not(given, target, call)
    if reason:
        raise ValueError(f"{given} can't run {kernel} on {target.name}: {reason}")
    return given


def default_config(kernel: str, target: Target, call: Call) -> Config | None:
    """The first of the target's configs, from large tiles to small, that fits and fills the device.

    The one with the most tiles, if none fills it.  Of those for one pass over dy, whose rest is
    split among the device's processors, the one with the fewest partial sums.  None, if none fits.
    """
    rows = _rows(DEFAULTS[target.name, kernel], call)
    fitting = [config for config in rows if not why_not(config, target, call)]
    few_rows = max(16, power_of_two(call.m))
    suited = [config for config in fitting if config.block_m <= few_rows] or fitting[-1:]
    if call.project and kernel == "weight_grad":
        return min(suited, key=lambda config: partial_sums(config, target, call), default=None)
    for config in suited:
        if tiles(config, call) >= 0.9 * target.processors:
            return config
    return max(suited, key=lambda config: tiles(config, call), default=None)


def candidates(kernel: str, target: Target, call: Call) -> list[Config]:
    """What tuning tries: the defaults of the target and their neighbours, as far as they fit."""
    rows = DEFAULTS[target.name, kernel]
    if isinstance(rows, dict):
        rows = [config for table in rows.values() for config in table]
    neighbours: dict[Config, None] = {}
    for config in rows:
        for warps in (config.warps, 4, 8):
            for stages in range(max(2, config.stages - 1), config.stages + 2):
                changed = replace(config, warps=warps, stages=stages)
                neighbours[changed] = None
                if isinstance(config, GemmConfig):
                    neighbours[replace(changed, group=4)] = None
                    neighbours[replace(changed, group=16)] = None
                    neighbours[replace(changed, descriptors=False)] = None
    return [config for config in neighbours if not why_not(config, target, call)]


def _rows(table: Any, call: Call) -> tuple[Config, ...]:
    if not isinstance(table, dict):
        return table
    if call.alone:
        return table["add"]
    exact = call.itemsize == 4 and call.precision == "ieee"
    return table["ieee" if exact else call.itemsize]
