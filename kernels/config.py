"""Launch configs (tiles, warps, stages): how one is chosen for a call, and what fits a target.

For each target and kernel, the table in defaults.py has configs that compile well.  A cost model
chooses one of them for a call.  It counts bytes (:meth:`Config.through_l2`) and programs
(:meth:`Config.tiles`, :meth:`ThinConfig.capacity`).  No GPU has measured the model.  ``fastlora
tune`` measures plans and tiles on the user's device, and its result replaces the model's choice
(plan.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from .faults import miscompiles_pipelines
from .target import Target

LONGEST = 2**31 - 2**17  # of an axis: 32 bits hold an index up to here, plus a few tiles
MAX_PROJECTIONS = 4  # in one launch; larger groups take several
# A call has few rows if it has at most this many: then loading the weight takes most of a base
# product's time (an assumption).
FEW_ROWS = 64
MARGIN = 2048  # bytes of shared memory for barriers and alignment
# The most float32 accumulators in a thread: half of its 255 registers.  Configs with more spill
# when compiled (`make compile-report`).
_MOST_SUMS = 128
# A config prints as a word, for example 64x64-w8-s4-r256: these letters name its numbers.
_LETTERS = {"w": "warps", "s": "stages", "g": "group", "r": "width"}


@dataclass(frozen=True)
class Call:
    """All properties of a launch that the choice of its config depends on.

    Sizes belong to the kernel's operands, not to the layer's: for dx, ``n`` is the layer's K.
    """

    m: int  # rows
    n: int  # columns of the tiled matrix: OUT, or x in project and weight_grad
    r: int  # rank, the largest of the group
    itemsize: int  # of x, in bytes
    precision: str  # "tf32" or "ieee"
    projections: int = 1
    masked: bool = False  # with dropout
    # Whether the launch also computes a thin product: dh in weight_grad, h in a base product (then
    # the kernel is gemm_lowrank_few_rows).
    project: bool = False
    pointers: bool = False  # base products: an operand can't be loaded by tensor descriptor
    packed: str = ""  # base products: the kind of codes of a packed q
    segments: int = 0  # how many segments the rows are cut into; 0: not cut
    low_rank: bool = False  # weight_grad: also computes the low-rank part of dx
    int8: str = ""  # gemm_int8_lowrank: "int8", or "rotated int8" if it rotates its result

    @property
    def product(self) -> str:
        """How products are computed: in "16-bit", in "tf32", or in exact "float32"."""
        if self.itemsize == 2:
            return "16-bit"
        return "tf32" if self.precision == "tf32" else "float32"

    def row_tiles(self, block_m: int) -> int:
        return row_tiles(self.m, block_m, self.segments)


@dataclass(frozen=True)
class Config:
    """Tiles, warps and pipeline stages of a launch.

    Each kernel has a subclass with its tile sizes and its cost in registers and memory.  The cost
    also depends on the :class:`Call`, which the methods take.  A config prints as a word, which
    :meth:`of` parses: ``128x256x64-w8-s3-tma`` has tiles of that size, 8 warps, 3 stages, and loads
    by descriptor.
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
        defaults = {each.name: each.default for each in fields(self)}
        numbers = [
            f"{letter}{getattr(self, name)}"
            for letter, name in _LETTERS.items()
            if name in defaults and (letter in "ws" or getattr(self, name) != defaults[name])
        ]
        return "-".join([tile, *numbers] + ["tma"] * getattr(self, "descriptors", False))

    def block_r(self, call: Call) -> int:
        """BLOCK_R: the columns of one step over the rank, a power of two, at least 16."""
        raise NotImplementedError

    def tiles(self, call: Call) -> int:
        """The number of programs of a launch, before its rows or columns are split."""
        raise NotImplementedError

    def sums(self, call: Call) -> int:
        """The number of float32 accumulators that a program holds at once."""
        raise NotImplementedError

    def through_l2(self, call: Call) -> float:
        """Ratio of L2 requests to DRAM traffic, both in bytes, of a thin product.

        A byte is read from DRAM once, and from L2 each time that a program loads it.  Smaller tiles
        mean more programs, and each of them loads the adapter, or x, again.
        """
        return 0.0

    def shared_memory(self, target: Target, call: Call) -> int:
        """An upper bound of a program's shared memory, in bytes; adapters count as float32."""
        raise NotImplementedError

    def tensor_memory(self, target: Target, call: Call) -> int:
        """The columns of Blackwell's tensor memory that a program allocates."""
        return 0

    def why_not(self, target: Target, call: Call) -> str:
        """Why this config can't run the call on the target; "" if it can.

        This is the only such check: defaults, tuning and callers' configs all pass through it.  It
        doesn't predict every register spill; ``make compile-report`` shows the defaults' spills.
        """
        memory, columns = self.shared_memory(target, call), self.tensor_memory(target, call)
        sums = self.sums(call) // (self.warps * target.warp_size)
        if memory > target.shared_memory:
            return f"{memory} bytes of shared memory, but there are {target.shared_memory}"
        if columns > target.tensor_memory > 0:
            return f"{columns} columns of tensor memory, but there are {target.tensor_memory}"
        if sums > _MOST_SUMS and target.kind != "cpu":
            return f"{sums} float32 sums in a thread, but at most {_MOST_SUMS} fit its registers"
        if self.stages > 1 and miscompiles_pipelines(target):
            return f"{self.stages} stages, but Triton miscompiles pipelined loops for {target.name}"
        if (call.project or call.low_rank) and call.r > self.block_r(call):
            return f"rank {call.r} in one step, but a step has {self.block_r(call)}"
        return ""

    def neighbors(self) -> "Iterator[Config]":
        """This config, and configs with other warps, stages, group or loads, for tuning to try."""
        stages = range(max(2, self.stages - 1), self.stages + 2) if self.stages > 1 else (1,)
        yield from (replace(self, warps=w, stages=s) for w in (self.warps, 4, 8) for s in stages)
        for name, values in {"group": (4, 16), "descriptors": (False,)}.items():
            if hasattr(self, name):
                yield from (replace(self, **{name: value}) for value in values)


class ThinConfig(Config):
    """A config of a kernel whose programs hold all U_i of a group: ``project``, ``weight_grad``."""

    width: int  # the most columns that a program's tiles of all U_i have together

    def block_r(self, call: Call) -> int:
        n = power_of_two(call.projections)
        return min(max(16, power_of_two(call.r)), 128 // min(n, 2), self.width // n)

    def capacity(self, target: Target, call: Call) -> int:
        """The number of programs of a thin product that should run at once.

        It is one program for each processor.  With several masks (dropout in a group), it is
        ``target.masking`` programs, so that one loads while another computes masks.  But if all
        ranks together exceed 64, a processor's registers hold only one program.
        """
        several_masks = call.masked and call.projections > 1 and call.projections * call.r <= 64
        return target.processors * (target.masking if several_masks else 1)


# DEFAULTS[target, kernel][product]: configs in the order of preference.  defaults.py fills it.
DEFAULTS: dict[tuple[str, str], dict[str, tuple[Config, ...]]] = {}


def rows(kernel: str, target: Target, call: Call) -> tuple[Config, ...]:
    """The rows of the target's table for this kind of call: configs in the order of preference."""
    if call.packed:
        kernel = "packed"
    elif call.int8:
        kernel += f" of {call.int8}"
    elif call.project and kernel == "weight_grad":
        kernel = "one pass"
    elif call.low_rank:
        kernel = "one pass over x"
    elif call.masked and call.projections > 1 and kernel != "gemm_lowrank":
        kernel += " of a masked group"
    return DEFAULTS[target.name, kernel][call.product]


def default_config(kernel: str, target: Target, call: Call) -> Config | None:
    """The config that the cost model chooses from the target's table; None if no config fits.

    Thin products (``project``, ``lowrank``, ``weight_grad``): the first fitting config with
    through_l2 <= limit.  Base products (``gemm_lowrank``): the first fitting config with tiles >=
    0.9 · processors.

    The choice must not depend much on the number of rows, because a new config is compiled in the
    middle of training when a batch has a new length.  So a layer's thin products have one config,
    and its base products have one for few rows and one for many.
    """
    fitting = [config for config in rows(kernel, target, call) if not config.why_not(target, call)]
    if kernel != "gemm_lowrank":
        # L2 can serve more requests while masks are computed, so masks raise the limit.
        # max(…, limit) makes all configs below the limit equal; min() takes the first of equals, or
        # the config with the fewest requests if none is below the limit.
        limit = target.l2 + call.masked * (call.projections - 1) / 2
        return min(fitting, key=lambda each: max(each.through_l2(call), limit), default=None)
    few = call.m <= FEW_ROWS * max(1, call.segments)
    # Count tiles for FEW_ROWS rows if there are few, and for 2048 rows otherwise, not for call.m.
    # (2048, because the fused plan is meant for about 2048 rows and more; see plan.py.)
    counted_call = replace(call, m=FEW_ROWS if few else 2048)
    suited = [config for config in fitting if config.block_m <= FEW_ROWS] if few else fitting
    if call.packed:
        # Every tile of rows unpacks the weight again.  So a tile should hold all rows (up to
        # FEW_ROWS): take the smallest block_m >= min(rows, FEW_ROWS), and count one tile of rows.
        m = cdiv(call.m, call.segments or 1)
        heights = [c.block_m for c in fitting if c.block_m >= min(m, FEW_ROWS)]
        suited = [config for config in fitting if config.block_m == min(heights, default=0)]
        counted_call = replace(call, m=1)
    for config in suited:
        if config.tiles(counted_call) >= 0.9 * target.processors:
            return config
    # No config has enough tiles: take the one with the most.
    return max(suited or fitting[-1:], key=lambda config: config.tiles(counted_call), default=None)


@lru_cache(maxsize=4096)
def chosen_config(
    kernel: str, target: Target, call: Call, config: Any = None, preferred: Any = None
) -> Any:
    """``config`` if it is given, else ``preferred`` if that fits the call, else the default.

    Raises ValueError with the text of :meth:`Config.why_not` if the chosen config doesn't fit.
    """
    assert max(call.m, call.n, call.r) <= LONGEST
    if config is None and preferred is not None and not preferred.why_not(target, call):
        return preferred
    chosen = config or default_config(kernel, target, call) or rows(kernel, target, call)[-1]
    reason = chosen.why_not(target, call)
    if reason:
        raise ValueError(f"{chosen} can't run {kernel} on {target.name}: {reason}")
    return chosen


def candidates(kernel: str, target: Target, call: Call) -> list[Config]:
    """The configs that tuning tries: the target's tables and their neighbors, if they fit the call.

    They are sorted by distance from the default: Σ |log2 of the ratio| over tile sizes, warps, ….
    The default comes first, with distance 0.
    """
    kind = type(rows(kernel, target, call)[0])
    tables = [table for (name, _), table in DEFAULTS.items() if name == target.name]
    listed = [config for table in tables for each in table.values() for config in each]
    tried = dict.fromkeys(n for c in listed if type(c) is kind for n in c.neighbors())
    fitting = [config for config in tried if not config.why_not(target, call)]
    default = vars(default_config(kernel, target, call) or next(iter(tried))).values()

    def doublings(config: Config) -> float:
        pairs = zip(vars(config).values(), default, strict=True)
        # 1 + …, because the pairs include switches, which are 0 or 1.
        return sum(abs(math.log2((1 + a) / (1 + b))) for a, b in pairs)

    return sorted(fitting, key=doublings)


def splits(at_once: int, programs: int, length: int, step: int, least: int) -> tuple[int, int]:
    """(number of splits of the summed axis, steps in each), so that ``at_once`` programs run.

    A split sums only a part of the axis, into a plane of partial sums of its own ("split-K").  The
    plane costs memory traffic, so a split has at least two steps and about ``least`` elements.
    ``programs``: how many there are without splits.  ``length``: the elements of the summed axis.
    ``step``: its elements in one step of the loop.
    """
    shortest = max(2, cdiv(least, step)) * step
    wanted = max(1, min(at_once // programs, cdiv(length, shortest)))
    steps = cdiv(cdiv(length, wanted), step)
    count = cdiv(length, steps * step)
    assert count * steps * step < 2**31  # the last split's end, an index of 32 bits
    return count, steps


def chunks(*groups: Sequence | None) -> Iterator[tuple]:
    """Yield the operands of each launch: all lists, sliced to MAX_PROJECTIONS entries.

    Each list has an entry for each projection, or is None in all launches.  The number of launches
    follows from the longer of the first two lists.
    """
    most = max(len(group or ()) for group in groups[:2])
    if most <= MAX_PROJECTIONS:  # no slices: slicing a tensor takes host time
        yield groups
        return
    for first in range(0, most, MAX_PROJECTIONS):
        part = slice(first, first + MAX_PROJECTIONS)
        yield tuple(None if group is None else group[part] for group in groups)


def cdiv(length: int, step: int) -> int:
    return -(-length // step)


def row_tiles(rows: int, block_m: int, segments: int | None) -> int:
    """The number of tiles of rows; with segments an upper bound, which segments.py explains."""
    assert rows + ((segments or 0) + 4) * block_m < 2**31  # the last tile's end, in 32 bits
    return rows // block_m + segments + 1 if segments else cdiv(rows, block_m)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
