"""How a call multiplies by the base weight: in a fused Triton kernel, or by torch.

* Fused: one kernel, ``gemm_lowrank``, computes the base product and the adapter's part.
* In place: ``lowrank`` writes the adapter's part, and torch's product (cuBLAS, hipBLASLt) is added
  to it.  For experts and many adapters the order is reversed.

A measurement on this device decides, if there is one (``fastlora tune``).  Otherwise :func:`rule`
decides, which no GPU has measured yet.  In 16 bits on some NVIDIA targets it follows a model of
time (docs/kernels.md).  Elsewhere it chooses torch's product, because the speed of that is known.
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
    """How a call multiplies by its base weight: ``FUSED``, ``IN_PLACE``, or one with settings."""

    fused: bool  # base product and adapter in one kernel
    gemm: GemmConfig | None = None  # the fused kernel's tiles, used if they fit the call
    # Whether the fused kernel unpacks a packed weight.  Otherwise ``dequant`` unpacks it before, in
    # a launch of its own.
    unpacks: bool = False


@dataclass(frozen=True)
class Row:
    """One measurement of ``fastlora tune``: the sizes of a call and its fastest plan."""

    device: str  # its name
    m: int  # rows
    n: int  # columns of the result
    k: int  # depth of the base product, summed over a group
    r: int
    itemsize: int
    masked: bool
    projections: int
    plan: Plan
    backward: bool = False
    segments: int = 0

    def distance(self, call: Call, k: int) -> float:
        """How many doublings or halvings lead from this row's sizes to a call's, in all."""
        call_sizes = call.m, call.n, k, call.r, call.projections, call.segments or 1
        row_sizes = self.m, self.n, self.k, self.r, self.projections, self.segments or 1
        return sum(abs(math.log2(a / b)) for a, b in zip(call_sizes, row_sizes, strict=True))


FUSED, IN_PLACE = Plan(fused=True), Plan(fused=False)
UNPACKING = Plan(fused=True, unpacks=True)
# Both limits come from the model of time in docs/kernels.md.
MANY_ROWS = 1449  # from so many rows on, a fused kernel has a tile for every processor
SHORT = 2896  # up to this depth, a pass over the output is a large part of a product's time
_NEAR = 2.0  # a measured row decides for calls up to this distance, in doublings
# Targets where, by the model, Triton's product is fast enough compared with cuBLAS's.
_FUSING = ("sm_86", "sm_90", "sm_120")
_measured: tuple[Row, ...] = ()
edition = 0  # counts changes of ``_measured``; part of the cache keys of calls


def rule(target: Target, call: Call, k: int, backward: bool = False) -> Plan:
    """The plan of a call without a measurement near it.

    ``k`` is the depth of the base product.

    * Few rows: loading the weight takes most of the time.  A forward without dropout is fused,
      because one launch then computes h and y.  dx, and calls with dropout, need several launches
      in both plans.
    * Many rows: the fused kernel saves passes over the output.  That is a large part of the time if
      the depth is small.  But Triton's product is about a tenth slower than cuBLAS's (modeled),
      which costs more the larger the depth is.
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
    """The rule for experts with ``rows`` rows each.

    The plan is fused for few rows, because loading the weights takes most of the time.  It is in
    place for many rows and a deep product, if torch has a grouped kernel for the target.
    """
    has_kernel = target.name in ("sm_90", "sm_100")
    return IN_PLACE if has_kernel and rows > 1024 and k > 2048 else FUSED


def use_rows(rows: Iterable[Row]) -> None:
    """Choose plans by these measurements from now on.  Rows of other devices have no effect."""
    global _measured, edition
    _measured, edition = tuple(rows), edition + 1
    _chosen.cache_clear()


forced: Plan | None = None  # not a context variable: a backward runs in another thread


@contextmanager
def use_plan(plan: Plan) -> Iterator[None]:
    """Inside, every call follows this plan; for tests and measurements."""
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
    """The plan for a result [M, n] of a base product with depth k; ``x`` is x or, for dx, dy.

    ``ranks``: of the adapters.  ``packed``: the kernel can unpack this weight.  It does so for few
    rows, because loading the weight takes most of the time, and a dense weight has two to eight
    times as many bytes.  It also does so for segments with few rows each, because then only one or
    two tiles of rows unpack each weight.
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
    distances = [
        (row.distance(call, k), i, row.plan)
        for i, row in enumerate(_measured)
        if (row.device, row.itemsize, row.masked, row.backward, row.segments > 0) == kind
    ]
    distance, _, plan = min(distances, default=(math.inf, 0, IN_PLACE))
    return plan if distance <= _NEAR else rule(target, call, k, backward)


def low_rank_pays(x: Tensor, ranks: Sequence[int], precision: str, masked: bool) -> bool:
    """Whether ``weight_grad`` should compute dx's low-rank part with d lora_a (plans in place).

    This saves a launch and moves as many bytes.  By the model, it saves time for few rows, where a
    kernel takes about as long as its launch.  With many rows it doesn't, because ``weight_grad``
    has one program on each processor, which hides less of the masks' work than the many programs of
    ``lowrank``.  In compiled code, four masks don't fit in a thread's registers.
    """
    size = x.element_size(), precision, min(len(ranks), MAX_PROJECTIONS)
    call = Call(*x.shape, max(ranks), *size, masked, low_rank=True)
    fits = default_config("weight_grad", target_of(x.device), call) is not None
    return fits and len(x) < MANY_ROWS and masked * len(ranks) <= 3
