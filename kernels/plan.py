"""Who multiplies by the base weight: a fused Triton kernel, or torch on top of the adapter's part.

What was measured on this device decides, where somebody did (``fastlora tune``).  Else a rule does,
which no GPU has measured.  For 16 bits on some NVIDIA targets it comes of a model of time
(docs/gpu.md).  Elsewhere it takes torch's product (cuBLAS, hipBLASLt), whose speed is known, and
leaves to Triton what torch has no kernel for: thin products, dropout masks, sums of low-rank terms.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from .config import FEW_ROWS, MAX_PROJECTIONS, Call, cdiv, default_config
from .gemm_config import GemmConfig
from .target import Target, target_of


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
    """What was measured: m rows, n output features, k depth (summed over a group)."""

    device: str  # its name
    m: int
    n: int
    k: int
    r: int
    itemsize: int
    masked: bool
    projections: int
    plan: Plan
    backward: bool = False
    segments: int = 0

    def distance(self, call: Call, k: int) -> float:
        """From a call, in doublings of its sizes."""
        ours = call.m, call.n, k, call.r, call.projections, call.segments or 1
        its = self.m, self.n, self.k, self.r, self.projections, self.segments or 1
        return sum(abs(math.log2(a / b)) for a, b in zip(ours, its, strict=True))


FUSED, IN_PLACE = Plan(fused=True), Plan(fused=False)
UNPACKING = Plan(fused=True, unpacks=True)
MANY_ROWS = 1449  # from which a fused kernel has enough tiles for every processor
SHORT = 2896  # a depth up to which passes over the output count
_NEAR = 2.0  # doublings of its sizes, in all, up to which a row says something of a call
# Targets whose Triton is near enough to cuBLAS, by the model.
_FUSING = ("sm_86", "sm_90", "sm_120")
_measured: tuple[Row, ...] = ()
edition = 0  # of them


def rule(target: Target, call: Call, k: int, backward: bool = False) -> Plan:
    """The plan of a call that nobody measured.

    Few rows: a forward waits for the weight's bytes, and one launch is least; dx would walk alone.
    Many: fused saves passes over the output, which count where the product is short.  A product in
    Triton is some tenth slower than cuBLAS's, which counts where it is long.
    """
    if target.kind == "cpu":
        return FUSED
    if call.segments:
        return _of_segments(target, cdiv(call.m, call.segments), k)
    if target.kind != "cuda" or call.itemsize != 2:
        return IN_PLACE
    if call.m <= FEW_ROWS:
        return IN_PLACE if call.masked or backward else FUSED
    is_short = call.m >= MANY_ROWS and k <= SHORT
    return FUSED if is_short and target.name in _FUSING else IN_PLACE


def _of_segments(target: Target, rows: int, k: int) -> Plan:
    """With a few hundred rows each they wait for the weights' bytes: fused.

    For many and a long product torch's kernel, where there is one.
    """
    has_kernel = target.name in ("sm_90", "sm_100")
    return IN_PLACE if has_kernel and rows > 1024 and k > 2048 else FUSED


def use_rows(rows: Iterable[Row]) -> None:
    """These were measured; those of other devices are passed over."""
    global _measured, edition
    _measured, edition = tuple(rows), edition + 1
    _chosen.cache_clear()


forced: Plan | None = None  # no context variable, since a backward runs in another thread


@contextmanager
def use_plan(plan: Plan) -> Iterator[None]:
    """Every call in the block follows this plan: to test or to measure one."""
    global forced
    before, forced = forced, plan
    try:
        yield
    finally:
        forced = before


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
    """The plan for an output [M, n] from a depth k, as deep as x or dy.

    ``packed``: of a weight that the kernel could unpack.  With few rows it should, since the launch
    waits for the weight's bytes, of which the dense one has two to eight times as many.  Of
    segments with few rows each, a weight is unpacked for one tile of rows, or two.
    """
    if forced is not None:
        return forced
    if packed and len(x) <= FEW_ROWS * max(1, segments):
        return UNPACKING
    count, r = max(1, len(ranks)), max(ranks, default=1)
    call = Call(len(x), n, r, x.element_size(), precision, count, masked, segments=segments)
    return _chosen(target_of(x.device), call, k, backward)


@lru_cache(maxsize=1024)
def _chosen(target: Target, call: Call, k: int, backward: bool = False) -> Plan:
    kind = (target.device, call.itemsize, call.masked, backward, call.segments > 0)
    near = [
        (row.distance(call, k), i, row.plan)
        for i, row in enumerate(_measured)
        if (row.device, row.itemsize, row.masked, row.backward, row.segments > 0) == kind
    ]
    distance, _, plan = min(near, default=(math.inf, 0, IN_PLACE))
    return plan if distance <= _NEAR else rule(target, call, k, backward)


def low_rank_pays(x: Tensor, ranks: Sequence[int], precision: str, masked: bool) -> bool:
    """Whether dx's low-rank part, in place, comes with d lora_a: a launch less, for as many bytes.

    Modeled: of few rows each of both takes about as long as a launch.  Of many they don't, and
    there one program a processor hides less of a mask's work than the many of ``lowrank``.  Four
    masks are more than a thread's registers hold, from compilation.
    """
    size = x.element_size(), precision, min(len(ranks), MAX_PROJECTIONS)
    call = Call(*x.shape, max(ranks), *size, masked, low_rank=True)
    fits = default_config("weight_grad", target_of(x.device), call) is not None
    return fits and len(x) < MANY_ROWS and masked * len(ranks) <= 3
