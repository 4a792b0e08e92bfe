"""Who multiplies by the base weight: a fused Triton kernel, or torch on top of the adapter's part.

A row of a table decides: the nearest one of the target.  No GPU has measured these kernels yet.
For sm_90 in 16 bits a model of time has set the rows (docs/gpu.md).  Elsewhere they choose
torch's product (cuBLAS, hipBLASLt), whose speed is known, and leave to Triton what torch has no
kernel for: thin products, dropout masks, sums of low-rank terms.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from torch import Tensor

from .config import FEW_ROWS, Call, cdiv
from .gemm_config import GemmConfig
from .target import TARGETS, Target, target_of


@dataclass(frozen=True)
class Plan:
    """``fused``: base product and adapter in one kernel, with these tiles if they fit the call.

    ``unpacks``: that kernel reads a packed weight's codes.  Else they are made dense before.
    """

    fused: bool
    gemm: GemmConfig | None = None
    unpacks: bool = False


@dataclass(frozen=True)
class Row:
    """What was found for one call: m rows, n output features, k depth (summed over a group)."""

    target: str
    m: int
    n: int
    k: int
    r: int
    itemsize: int
    masked: bool
    projections: int
    plan: Plan
    backward: bool = False
    segments: bool = False  # then m is the rows of one


FUSED, IN_PLACE = Plan(fused=True), Plan(fused=False)
UNPACKING = Plan(fused=True, unpacks=True)


def _modelled(m: int, k: int, masked: bool, backward: bool) -> Plan:
    """Few rows: a forward waits for the weight, and one launch is least; dx would walk alone.

    Many: fused saves passes over the output, which count where the product is short.  A product in
    Triton is some tenth slower than cuBLAS's, which counts where it is long.
    """
    if m <= 64:
        return IN_PLACE if masked or backward else FUSED
    return FUSED if m >= 2048 and k <= 2048 else IN_PLACE


# The nearer row is taken, in doublings: so 64 rows are still few, 1500 are many, and a depth of
# 3072 is long.
_MODELLED = tuple(
    Row("sm_90", m, 4096, k, 16, 2, masked, 1, _modelled(m, k, masked, backward), backward)
    for m, k, masked, backward in product((32, 128, 1024, 2048), (2048, 4096), *[(False, True)] * 2)
)
_ASSUMED = tuple(
    Row(name, 4096, 4096, 4096, 16, size, False, 1, FUSED if target.kind == "cpu" else IN_PLACE)
    for name, target in TARGETS.items()
    for size in (2, 4)
    if (name, size) != ("sm_90", 2)
)


def _of_segments(name: str, m: int, k: int) -> Plan:
    """Rows for a few hundred rows of each: fused, since they wait for the weights' bytes.

    For many and a long product torch's kernel, where there is one.
    """
    has_kernel = name in ("sm_90", "sm_100")
    return IN_PLACE if has_kernel and m >= 4096 and k >= 4096 else FUSED


_SEGMENTS = tuple(
    Row(name, m, 4096, k, 16, size, False, 1, _of_segments(name, m, k), segments=True)
    for name, m, k, size in product(TARGETS, (256, 4096), (1024, 4096), (2, 4))
)
ROWS: tuple[Row, ...] = _MODELLED + _ASSUMED + _SEGMENTS

_forced: Plan | None = None  # no context variable, since a backward runs in another thread


@contextmanager
def use_plan(plan: Plan) -> Iterator[None]:
    """Every call in the block follows this plan: to test or to measure one."""
    global _forced
    before, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = before


def forced() -> Plan | None:
    return _forced


def plan_for(
    x: Tensor,
    n: int,
    k: int,
    ranks: Sequence[int],
    precision: str,
    *,
    masked: bool = False,
    backward: bool = False,
    packed: bool = False,
    segments: int = 0,
) -> Plan:
    """The plan of the nearest row, for an output [M, n] from a depth k, as deep as x or dy.

    ``packed``: of a weight that the kernel could unpack.  With few rows it should, since the launch
    waits for the weight's bytes, of which the dense one has two to eight times as many.  Of
    segments with few rows each, a weight is unpacked for one tile of rows, or two.
    """
    if _forced is not None:
        return _forced
    if packed and len(x) <= FEW_ROWS * max(1, segments):
        return UNPACKING
    call = Call(
        len(x), n, max(ranks), x.element_size(), precision, len(ranks), masked, segments=segments
    )
    return _nearest(target_of(x.device), call, k, backward)


@lru_cache(maxsize=1024)
def _nearest(target: Target, call: Call, k: int, backward: bool = False) -> Plan:
    here, m = (target.name, call.itemsize, call.segments > 0), cdiv(call.m, call.segments or 1)
    rows = [row for row in ROWS if (row.target, row.itemsize, row.segments) == here]

    def distance(row: Row) -> float:
        ours = m, call.n, k, call.r, call.projections
        theirs = row.m, row.n, row.k, row.r, row.projections
        doublings = sum(abs(math.log2(a / b)) for a, b in zip(ours, theirs, strict=True))
        return doublings + (row.masked != call.masked) + 99 * (row.backward != backward)

    return min(rows, key=distance).plan
