"""Tile configs: records, a default for every architecture, and the one check of what fits."""

from dataclasses import dataclass, replace
from typing import Any

from .target import Target


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of :func:`gemm_lowrank`: OUT in block_m x block_n, in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8  # rows of tiles that go together, for the L2 cache
    descriptors: bool = False  # load by tensor descriptor (TMA) where the operands allow it


@dataclass(frozen=True)
class ProjectConfig:
    """Tiles of :func:`project`: block_m rows of x, in steps of block_k columns."""

    block_m: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class WeightGradConfig:
    """Tiles of :func:`weight_grad`: block_n columns, in steps of block_m rows."""

    block_m: int
    block_n: int
    warps: int
    stages: int


Config = GemmConfig | ProjectConfig | WeightGradConfig


@dataclass(frozen=True)
class Call:
    """What a choice of tiles depends on.  ``m`` rows, ``n`` columns of what is tiled, rank r."""

    m: int
    n: int
    r: int  # the largest of the group
    itemsize: int  # of x, in bytes
    precision: str  # "tf32" or "ieee"
    projections: int = 1
    masked: bool = False
    project: bool = False  # weight_grad: with dh in the same pass


MAX_PROJECTIONS = 4  # in one launch; larger groups take several
_ACCUMULATORS = 128  # float32 registers of a thread that sums may take, of 255


def chunks(projections: int) -> list[slice]:
    """The projections of each launch."""
    firsts = range(0, projections, MAX_PROJECTIONS)
    return [slice(first, first + MAX_PROJECTIONS) for first in firsts]


def block_r(config: Config, call: Call) -> int:
    """The columns of a step over the rank: a power of two that tensor cores take."""
    most = 64 if isinstance(config, GemmConfig) or call.projections > 2 else 128
    return min(max(16, _power_of_two(call.r)), most)


def why_not(config: Config, target: Target, call: Call) -> str | None:
    """Why this config can't run there, or None: every path asks here, nobody else decides."""
    r = block_r(config, call)
    threads = config.warps * target.warp_size
    # Hopper and newer read the tensor cores' operands from shared memory until a step is over.
    copies = config.stages if target.descriptors else config.stages - 1
    if isinstance(config, GemmConfig):
        accumulators = config.block_m * config.block_n
        if call.masked and call.projections > 1:
            accumulators *= 2
        step = (config.block_m + config.block_n) * config.block_k
        low_rank = (config.block_m + config.block_n) * r
        if call.r <= r and not call.masked:
            low_rank *= call.projections  # loaded before the main loop
        store = config.block_m * config.block_n
        if config.descriptors:  # half of the tile, beside the main loop's buffers
            elements = copies * step + low_rank + store // 2
        else:
            elements = max(copies * step + low_rank, store)
        columns = config.block_n * _power_of_two(2 * call.projections)
        if target.tensor_memory and columns > target.tensor_memory:
            return f"{columns} columns of tensor memory, but there are {target.tensor_memory}"
    elif isinstance(config, ProjectConfig):
        accumulators = config.block_m * r * call.projections
        step = config.block_m * config.block_k + call.projections * config.block_k * r
        elements = copies * step + config.block_m * r
    else:
        accumulators = config.block_n * r * call.projections
        step = config.block_m * config.block_n + call.projections * config.block_m * r
        elements = copies * step + config.block_n * r
        if call.project:
            elements += config.block_m * r
            if call.r > r:
                return f"rank {call.r} in one step, but a step has {r}"
    shared_memory = elements * call.itemsize + 2 * 1024
    if shared_memory > target.shared_memory:
        return f"{shared_memory} bytes of shared memory, but there are {target.shared_memory}"
    if target.kind != "cpu" and accumulators > _ACCUMULATORS * threads:
        return f"{accumulators // threads} accumulators a thread, but there is room for 128"
    return None


def tiles(config: Config, call: Call) -> int:
    """How many programs this config makes of the call, before it is split."""
    if isinstance(config, GemmConfig):
        return _cdiv(call.m, config.block_m) * _cdiv(call.n, config.block_n)
    if isinstance(config, ProjectConfig):
        return _cdiv(call.m, config.block_m)
    return _cdiv(call.n, config.block_n)


def default_config(kernel: str, target: Target, call: Call) -> Config | None:
    """The first of the target's configs, from large tiles to small, that fits and fills the device.

    The one with the most tiles, if none fills it.  Where a tile of columns costs a plane of dh,
    the largest that fits.  None, if none fits.
    """
    rows = DEFAULTS[target.name, kernel]
    if isinstance(rows, dict):
        rows = rows["ieee" if call.itemsize == 4 and call.precision == "ieee" else call.itemsize]
    fitting = [config for config in rows if why_not(config, target, call) is None]
    few_rows = max(16, _power_of_two(call.m))
    suited = [config for config in fitting if config.block_m <= few_rows] or fitting[-1:]
    if call.project:
        return suited[0] if suited else None
    for config in suited:
        if tiles(config, call) >= 0.9 * target.processors:
            return config
    return max(suited, key=lambda config: tiles(config, call), default=None)


def splits(config: Config, target: Target, call: Call, length: int, step: int) -> tuple[int, int]:
    """(number of splits of an axis, its length in each): as many as the device has room for."""
    programs = tiles(config, call) * _cdiv(call.r, block_r(config, call))
    wanted = max(1, min(target.processors // programs, _cdiv(length, 2 * step)))
    each = _cdiv(_cdiv(length, wanted), step) * step
    return _cdiv(length, each), each


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
    return [config for config in neighbours if why_not(config, target, call) is None]


def _cdiv(length: int, step: int) -> int:
    return -(-length // step)


def _power_of_two(number: int) -> int:
    """The smallest one that is at least ``number``."""
    return 1 << (number - 1).bit_length()


# From large tiles to small.  No GPU has measured them yet: they are what compiles without a spill
# to tensor-core instructions (`make compile-report`) and fills the device's memory pipes on paper.
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
        GemmConfig(16, 32, 32, warps=4, stages=3),
    ),
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
}
_PROJECT = (
    ProjectConfig(64, 64, warps=4, stages=4),
    ProjectConfig(32, 128, warps=4, stages=4),
    ProjectConfig(16, 128, warps=4, stages=4),
    ProjectConfig(16, 64, warps=4, stages=3),
)
_AMD_PROJECT = (
    ProjectConfig(64, 64, warps=4, stages=2),
    ProjectConfig(16, 128, warps=4, stages=2),
    ProjectConfig(16, 64, warps=4, stages=2),
)
_WEIGHT_GRAD = (
    WeightGradConfig(64, 512, warps=8, stages=2),
    WeightGradConfig(64, 256, warps=8, stages=3),
    WeightGradConfig(64, 128, warps=4, stages=3),
    WeightGradConfig(128, 64, warps=4, stages=4),
    WeightGradConfig(128, 32, warps=4, stages=4),
    WeightGradConfig(32, 32, warps=4, stages=3),
)
_AMD_WEIGHT_GRAD = (
    WeightGradConfig(32, 256, warps=8, stages=2),
    WeightGradConfig(64, 128, warps=4, stages=2),
    WeightGradConfig(64, 64, warps=4, stages=2),
    WeightGradConfig(64, 32, warps=4, stages=2),
    WeightGradConfig(32, 32, warps=4, stages=2),
)
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
