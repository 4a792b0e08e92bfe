"""Tile configs: frozen records, what they take of a device, and the one check of what fits."""

from dataclasses import dataclass

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
    alone: bool = False  # gemm_lowrank: the low-rank term alone, added to what is there
    pointers: bool = False  # gemm_lowrank: with operands that no descriptor fits


MAX_PROJECTIONS = 4  # in one launch; larger groups take several
# Of a thread's 255, for sums and tiles; the rest is the compiler's.  Fitted, as the sums in
# `registers` are, to what compiled for sm_80, sm_90, sm_100 and gfx942 without a spill in a loop.
_REGISTERS = 140
_PER_POINTER = 4  # elements to be loaded for each register of their addresses
_MARGIN = 2048  # bytes of shared memory for barriers and alignment


def chunks(projections: int) -> list[slice]:
    """The projections of each launch."""
    firsts = range(0, projections, MAX_PROJECTIONS)
    return [slice(first, first + MAX_PROJECTIONS) for first in firsts]


def block_r(config: Config, call: Call) -> int:
    """The columns of a step over the rank: a power of two that tensor cores take."""
    if isinstance(config, GemmConfig):
        # Of a rank that 16 doesn't divide, Triton may load every element by itself, with a pointer.
        most = 64 if call.r <= 64 else 32 if call.r % 16 == 0 else 16
    else:
        most = 128 // power_of_two(call.projections)
    return min(max(16, power_of_two(call.r)), most)


def uses_descriptors(config: GemmConfig, call: Call) -> bool:
    return config.descriptors and not call.pointers


def one_step(config: GemmConfig, target: Target, call: Call) -> bool:
    """Whether the whole rank is one step, so that its tiles are loaded before the main loop.

    They wait in shared memory on Hopper and newer, elsewhere in registers, which few fit into.
    """
    alone = call.masked and call.projections == 1  # used at once
    wait = target.descriptors or alone or call.r * call.projections <= 16
    return call.r <= block_r(config, call) and wait


def why_not(config: Config, target: Target, call: Call) -> str:
    """Why this config can't run there; "" if it can.  Every path asks here."""
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
    return ""


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
        if call.alone:  # the only loop is the one over tiles
            low_rank = n * (config.block_m * size + config.block_n * 4) * r
            return copies * low_rank + store + _MARGIN
        step = (config.block_m + config.block_n) * config.block_k * size
        step += call.project * config.block_k * r * 4
        if uses_descriptors(config, call):  # half of the tile, beside the main loop's buffers
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
    columns = config.block_n * power_of_two(2 * call.projections)
    return columns + call.project * block_r(config, call)


def registers(config: Config, target: Target, call: Call) -> int:
    """What a thread holds at once: sums, and the tiles that go through registers on their way."""
    r, n = block_r(config, call), call.projections
    if isinstance(config, GemmConfig):
        out = config.block_m * config.block_n
        held = out * (1 + n // 2 if call.masked else 1)
        if call.masked and target.tensor_memory:
            held += out // 8  # out of tensor memory, to be masked, and back
        held += call.project * (config.block_m + config.block_k) * r
        if not uses_descriptors(config, call) and not call.alone:
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
        return cdiv(call.m, config.block_m) * cdiv(call.n, config.block_n)
    if isinstance(config, ProjectConfig):
        return cdiv(call.m, config.block_m)
    return cdiv(call.n, config.block_n)


def splits(config: Config, target: Target, call: Call, length: int, step: int) -> tuple[int, int]:
    """(number of splits of an axis, its length in each): as many as the device has room for."""
    programs = tiles(config, call) * cdiv(call.r, block_r(config, call))
    wanted = max(1, min(target.processors // programs, cdiv(length, 2 * step)))
    each = cdiv(cdiv(length, wanted), step) * step
    return cdiv(length, each), each


def partial_sums(config: WeightGradConfig, target: Target, call: Call) -> int:
    """The floats of one pass: a plane of dh a tile of columns, of d lora_b a split of rows."""
    n_planes = tiles(config, call)
    m_planes, _ = splits(config, target, call, call.m, config.block_m)
    floats = (n_planes > 1) * n_planes * call.m + (m_planes > 1) * m_planes * call.n
    return floats * call.r


def cdiv(length: int, step: int) -> int:
    return -(-length // step)


def power_of_two(number: int) -> int:
    """The smallest one that is at least ``number``."""
    return 1 << (number - 1).bit_length()
