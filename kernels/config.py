"""What the configs of all kernels share: what they are chosen for, what fits, how to choose."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from .faults import miscompiles_pipelines
from .target import Target

MAX_PROJECTIONS = 4  # in one launch; larger groups take several
FEW_ROWS = 64  # up to which a base product waits for the weight's bytes
MARGIN = 2048  # bytes of shared memory for barriers and alignment
# float32 sums of products that a thread may hold: half of its 255 registers, since those that
# compile with more spill (`make compile-report`).
_MOST_SUMS = 128
_LETTERS = {"w": "warps", "s": "stages", "g": "group", "r": "width"}  # of a config's word


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
    pointers: bool = False  # gemm_lowrank: with operands that no descriptor fits
    packed: str = ""  # gemm_lowrank: the kind of codes that q is made from
    segments: int = 0  # that the rows are cut into; 0: into none
    low_rank: bool = False  # weight_grad: with the low-rank term in the same pass

    @property
    def product(self) -> str:
        """How it multiplies: in "16-bit", "tf32" or exact "float32"."""
        if self.itemsize == 2:
            return "16-bit"
        return "tf32" if self.precision == "tf32" else "float32"

    def row_tiles(self, block_m: int) -> int:
        return row_tiles(self.m, block_m, self.segments)


@dataclass(frozen=True)
class Config:
    """Tiles, warps and pipeline stages of a launch; each kernel's file has its own, and its cost.

    It doesn't know the operands: a :class:`Call` does.  It prints as a word, which :meth:`of` reads
    back: ``128x256x64-w8-s3-tma`` has tiles of that size, 8 warps, 3 stages and descriptors.
    """

    @classmethod
    def of(cls, word: str) -> "Config":
        tile, *options = word.split("-")
        named = {_LETTERS[each[0]]: int(each[1:]) for each in options if each != "tma"}
        if "tma" in options:
            named["descriptors"] = True
        return cls(*map(int, tile.split("x")), **named)

    def __str__(self) -> str:
        tile = "x".join(str(size) for name, size in vars(self).items() if name[:6] == "block_")
        usual = {each.name: each.default for each in fields(self)}
        numbers = [
            f"{letter}{getattr(self, name)}"
            for letter, name in _LETTERS.items()
            if name in usual and (letter in "ws" or getattr(self, name) != usual[name])
        ]
        return "-".join([tile, *numbers] + ["tma"] * getattr(self, "descriptors", False))

    def block_r(self, call: Call) -> int:
        """The columns of a step over the rank: a power of two that tensor cores take."""
        n = power_of_two(call.projections)
        return min(max(16, power_of_two(call.r)), 128 // min(n, 2), self.width // n)

    def tiles(self, call: Call) -> int:
        """How many programs this makes of the call, before it is split."""
        raise NotImplementedError

    def sums(self, call: Call) -> int:
        """The float32 sums of products that a program holds at once."""
        raise NotImplementedError

    def through_l2(self, call: Call) -> float:
        """What programs ask of the L2 cache, over what memory has to give, of a thin product."""
        return 0.0

    def shared_memory(self, target: Target, call: Call) -> int:
        """An upper bound of what a program takes, in bytes; adapters count as float32."""
        raise NotImplementedError

    def tensor_memory(self, target: Target, call: Call) -> int:
        """The columns that a program takes."""
        return 0

    def why_not(self, target: Target, call: Call) -> str:
        """Why this can't run there; "" if it can.  Every path asks here.

        It doesn't foresee every spill: those of the defaults show in ``make compile-report``.
        """
        memory, columns = self.shared_memory(target, call), self.tensor_memory(target, call)
        sums = self.sums(call) // (self.warps * target.warp_size)
        if memory > target.shared_memory:
            return f"{memory} bytes of shared memory, but there are {target.shared_memory}"
        if columns > target.tensor_memory > 0:
            return f"{columns} columns of tensor memory, but there are {target.tensor_memory}"
        if sums > _MOST_SUMS and target.kind != "cpu":
            return f"{sums} sums a thread, but its registers have room for {_MOST_SUMS}"
        if self.stages > 1 and miscompiles_pipelines(target):
            return f"{self.stages} stages, but Triton miscompiles pipelined loops for {target.name}"
        if (call.project or call.low_rank) and call.r > self.block_r(call):
            return f"rank {call.r} in one step, but a step has {self.block_r(call)}"
        return ""

    def neighbors(self) -> "Iterator[Config]":
        """What tuning may try beside it."""
        stages = range(max(2, self.stages - 1), self.stages + 2) if self.stages > 1 else (1,)
        yield from (replace(self, warps=w, stages=s) for w in (self.warps, 4, 8) for s in stages)
        for name, values in {"group": (4, 16), "descriptors": (False,)}.items():
            if hasattr(self, name):
                yield from (replace(self, **{name: value}) for value in values)


# (target, kernel) → the product → rows: defaults.py fills it.
DEFAULTS: dict[tuple[str, str], dict[str, tuple[Config, ...]]] = {}


def rows(kernel: str, target: Target, call: Call) -> tuple[Config, ...]:
    """The target's configs for this kind of call."""
    if call.packed:
        kernel = "packed"
    elif call.project and kernel == "weight_grad":
        kernel = "one pass"
    elif call.low_rank:
        kernel = "one pass over x"
    elif call.masked and call.projections > 1 and kernel != "gemm_lowrank":
        kernel += " of a masked group"
    return DEFAULTS[target.name, kernel][call.product]


def default_config(kernel: str, target: Target, call: Call) -> Config | None:
    """The first of the target's rows that fits, and is wide enough for its L2 cache.

    Of a base product's, the first that fits and fills the device.  It is one for all numbers of
    rows, two of a base product, since each compiles in the middle of training.  None, if none fits.
    """
    fitting = [config for config in rows(kernel, target, call) if not config.why_not(target, call)]
    if kernel != "gemm_lowrank":
        # Behind the work on masks L2 has more time; of those that take too long, the shortest.
        enough = target.l2 + call.masked * (call.projections - 1) / 2
        return min(fitting, key=lambda each: max(each.through_l2(call), enough), default=None)
    few = call.m <= FEW_ROWS * max(1, call.segments)
    # 2048: the fused plan is meant for as many rows and more (plan.py).
    level = replace(call, m=FEW_ROWS if few else 2048)
    suited = [config for config in fitting if config.block_m <= FEW_ROWS] if few else fitting
    if call.packed:  # one tile of rows, as small as can be: each unpacks the weight anew
        m = cdiv(call.m, call.segments or 1)
        held = [c.block_m for c in fitting if c.block_m >= min(m, FEW_ROWS)]
        suited = [config for config in fitting if config.block_m == min(held, default=0)]
        level = replace(call, m=1)
    for config in suited:
        if config.tiles(level) >= 0.9 * target.processors:
            return config
    return max(suited or fitting[-1:], key=lambda config: config.tiles(level), default=None)


@lru_cache(maxsize=4096)
def chosen_config(
    kernel: str, target: Target, call: Call, config: Any = None, preferred: Any = None
) -> Any:
    """The config that a caller gave, else the preferred one if it fits, else the default.

    Raises ValueError with :meth:`Config.why_not`'s reason if it can't run this call.
    """
    if config is None and preferred is not None and not preferred.why_not(target, call):
        return preferred
    given = config or default_config(kernel, target, call) or rows(kernel, target, call)[-1]
    reason = given.why_not(target, call)
    if reason:
        raise ValueError(f"{given} can't run {kernel} on {target.name}: {reason}")
    return given


def candidates(kernel: str, target: Target, call: Call) -> list[Config]:
    """What tuning tries: all rows of the target and their neighbors, as far as they fit.

    The default comes first, and the nearer ones, by doublings, before the others.
    """
    kind = type(rows(kernel, target, call)[0])
    tables = [table for (name, _), table in DEFAULTS.items() if name == target.name]
    listed = [config for table in tables for each in table.values() for config in each]
    tried = dict.fromkeys(n for c in listed if type(c) is kind for n in c.neighbors())
    fitting = [config for config in tried if not config.why_not(target, call)]
    default = vars(default_config(kernel, target, call) or next(iter(tried))).values()

    def doublings(config: Config) -> float:
        pairs = zip(vars(config).values(), default, strict=True)
        return sum(abs(math.log2((1 + a) / (1 + b))) for a, b in pairs)  # switches too

    return sorted(fitting, key=doublings)


def room(target: Target, call: Call) -> int:
    """Programs of a thin product that should run at once: one a processor, or ``masking``.

    The registers of one at a high rank leave no room for another.
    """
    is_many = call.masked and call.projections > 1 and call.projections * call.r <= 64
    return target.processors * (target.masking if is_many else 1)


def splits(room: int, programs: int, length: int, step: int, least: int) -> tuple[int, int]:
    """(number of splits of an axis, steps in each): as many as there is room for.

    Each costs a plane of partial sums, so it is about two steps and ``least`` elements long.
    """
    longest = max(2, cdiv(least, step)) * step
    wanted = max(1, min(room // programs, cdiv(length, longest)))
    steps = cdiv(cdiv(length, wanted), step)
    return cdiv(length, steps * step), steps


def chunks(*groups: Sequence | None) -> Iterator[tuple]:
    """The same projections of every group, as many as a launch takes; None stays None."""
    if len(groups[0]) <= MAX_PROJECTIONS:  # no slice, which of a tensor takes time
        yield groups
        return
    for first in range(0, len(groups[0]), MAX_PROJECTIONS):
        part = slice(first, first + MAX_PROJECTIONS)
        yield tuple(None if group is None else group[part] for group in groups)


def cdiv(length: int, step: int) -> int:
    return -(-length // step)


def row_tiles(rows: int, block_m: int, segments: int | None) -> int:
    """The tiles of rows; with segments as many as there may be (segments.py), nobody's too."""
    return rows // block_m + segments + 1 if segments else cdiv(rows, block_m)


def power_of_two(number: int) -> int:
    """The smallest one that is at least ``number``."""
    return 1 << (number - 1).bit_length()
