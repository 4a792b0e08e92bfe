"""Tile configs: records, a default for every architecture, and the one check of what fits."""

from dataclasses import dataclass, replace
from functools import lru_cache
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
    project: bool = False  # weight_grad: with dh in the same pass; gemm_lowrank: with h
    add: bool = False  # gemm_lowrank: the low-rank term alone, added to what is there


MAX_PROJECTIONS = 4  # in one launch; larger groups take several
_REGISTERS = 140  # of a thread's 255, for sums and tiles; the rest is the compiler's
_PER_POINTER = 4  # elements to be loaded for each register of their addresses
_MARGIN = 2048  # bytes of shared memory for barriers and alignment


def chunks(projections: int) -> list[slice]:
    """The projections of each launch."""
    firsts = range(0, projections, MAX_PROJECTIONS)
    return [slice(first, first + MAX_PROJECTIONS) for first in firsts]


def block_r(config: Config, call: Call) -> int:
    """The columns of a step over the rank: a power of two that tensor cores take."""
    if isinstance(config, GemmConfig):
        # A rank that 16 doesn't divide is loaded one by one, with a pointer for each element.
        most = 64 if call.r <= 64 else 32 if call.r % 16 == 0 else 16
    else:
        most = 128 // _power_of_two(call.projections)
    return min(max(16, _power_of_two(call.r)), most)


def one_step(config: GemmConfig, target: Target, call: Call) -> bool:
    """Whether the whole rank is one step, so that its tiles are loaded before the main loop.

    They wait in shared memory on Hopper and newer, elsewhere in registers, which few fit into.
    """
    alone = call.masked and call.projections == 1  # used at once
    wait = target.descriptors or alone or call.r * call.projections <= 16
    return call.r <= block_r(config, call) and wait


def why_not(config: Config, target: Target, call: Call) -> str | None:
    """Why this config can't run there, or None: every path asks here, nobody else decides."""
    memory, columns = shared_memory(config, target, call), tensor_memory(config, target, call)
    taken = registers(config, target, call)
    if memory > target.shared_memory:
        return f"{memory} bytes of shared memory, but there are {target.shared_memory}"
    if columns > target.tensor_memory > 0:
        return f"{columns} columns of tensor memory, but there are {target.tensor_memory}"
    if taken > _REGISTERS and target.kind != "cpu":
        return f"{taken} registers a thread for sums and tiles, but there is room for {_REGISTERS}"
    if call.project and call.r > block_r(config, call):
        return f"rank {call.r} in one step, but a step has {block_r(config, call)}"
    return None


def shared_memory(config: Config, target: Target, call: Call) -> int:
    """An upper bound of what a program takes, in bytes; adapters count as float32."""
    r, n, size = block_r(config, call), call.projections, call.itemsize
    # Hopper and newer read the tensor cores' operands from shared memory until a step is over.
    copies = max(1, config.stages if target.descriptors else config.stages - 1)
    if isinstance(config, GemmConfig):
        low_rank = (config.block_m + config.block_n) * r * size
        if one_step(config, target, call):
            low_rank *= n
        if call.masked and size == 4:
            low_rank *= 2  # as loaded, and as tensor cores read it
        store = config.block_m * config.block_n * size
        if call.add:  # the only loop is the one over tiles
            low_rank = n * (config.block_m * size + config.block_n * 4) * r
            return copies * low_rank + store + _MARGIN
        step = (config.block_m + config.block_n) * config.block_k * size
        step += call.project * config.block_k * r * 4
        if config.descriptors:  # half of the tile, beside the main loop's buffers
            return copies * step + low_rank + store // 2 + _MARGIN
        return max(copies * step + low_rank, store) + _MARGIN
    if isinstance(config, ProjectConfig):
        x, a = config.block_m * config.block_k * size, n * config.block_k * r
        cast = a * size + call.masked * n * x
        return max(copies * (x + a * 4) + cast, config.block_m * r * 4) + _MARGIN
    v, u = config.block_m * config.block_n * size, n * config.block_m * r * size
    b = call.project * (config.block_n + config.block_m) * r * 4
    main = copies * (v + u) + call.masked * n * v + b
    return max(main, config.block_n * r * 4) + _MARGIN


def tensor_memory(config: Config, target: Target, call: Call) -> int:
    """The columns of an accumulator for every product, twice: before and after a step."""
    if not isinstance(config, GemmConfig) or not target.tensor_memory:
        return 0
    columns = config.block_n * _power_of_two(2 * call.projections)
    return columns + call.project * block_r(config, call)


def registers(config: Config, target: Target, call: Call) -> int:
    """What a thread holds at once: sums, and the tiles that go through registers on their way."""
    r, n = block_r(config, call), call.projections
    if isinstance(config, GemmConfig):
        held = config.block_m * config.block_n * (n if call.masked else 1)
        held += call.project * (config.block_m + config.block_k) * r
        if not config.descriptors and not call.add:
            held += (config.block_m + config.block_n) * config.block_k // _PER_POINTER
    elif isinstance(config, ProjectConfig):
        x = config.block_m * config.block_k
        held = n * ((config.block_m + config.block_k) * r + call.masked * x)
    else:
        v = config.block_m * config.block_n
        held = n * ((config.block_n + config.block_m) * r + call.masked * v)
        held += call.project * (config.block_n // 2 + config.block_m) * r
    return held // (config.warps * target.warp_size)


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
    rows = _rows(DEFAULTS[target.name, kernel], call)
    fitting = [config for config in rows if why_not(config, target, call) is None]
    few_rows = max(16, _power_of_two(call.m))
    suited = [config for config in fitting if config.block_m <= few_rows] or fitting[-1:]
    if call.project:
        return suited[0] if suited else None
    for config in suited:
        if tiles(config, call) >= 0.9 * target.processors:
            return config
    return max(suited, key=lambda config: tiles(config, call), default=None)


@lru_cache(maxsize=4096)
def chosen_config(kernel: str, target: Target, call: Call, config: Config | None) -> Config:
    """The config that a caller gave, or else the default one.

    Raises ValueError with :func:`why_not`'s reason if it can't run this call.
    """
    given = config or default_config(kernel, target, call)
    if given is None:
        given = _rows(DEFAULTS[target.name, kernel], call)[-1]
    reason = why_not(given, target, call)
    if reason is not None:
        raise ValueError(f"{given} can't run {kernel} on {target.name}: {reason}")
    return given


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


def _rows(table: Any, call: Call) -> tuple[Config, ...]:
    if not isinstance(table, dict):
        return table
    if call.add:
        return table["add"]
    exact = call.itemsize == 4 and call.precision == "ieee"
    return table["ieee" if exact else call.itemsize]


def _cdiv(length: int, step: int) -> int:
    return -(-length // step)


def _power_of_two(number: int) -> int:
    """The smallest one that is at least ``number``."""
    return 1 << (number - 1).bit_length()


# From large tiles to small.  No GPU has measured them yet: they are what compiles without a spill
# to tensor-core instructions (`make compile-report`) and fills the device's memory pipes on paper.
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
        GemmConfig(16, 32, 32, warps=4, stages=3),
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
        WeightGradConfig(64, 64, warps=4, stages=4),
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
