"""The default configs: a table for every architecture and kernel, from large tiles to small.

No GPU has measured them.  They are what compiles to tensor-core instructions without a spill in a
loop (`make compile-report`), with enough bytes under way to fill a device's memory pipes on paper.
"""

from dataclasses import replace

from .config import DEFAULTS, Config
from .gemm_config import GemmConfig
from .lowrank import LowRankConfig
from .project import ProjectConfig
from .weight_grad import WeightGradConfig

PRODUCTS = ("16-bit", "tf32", "float32")

# The first that fills the device.  For few rows (FEW_ROWS), of those with tiles of few rows.
_FLOAT32_GEMM = (
    GemmConfig(64, 64, 16, warps=8, stages=3),
    GemmConfig(32, 32, 32, warps=4, stages=3),
    GemmConfig(16, 32, 32, warps=4, stages=2),
)
_AMPERE_GEMM = {
    "16-bit": (
        GemmConfig(128, 128, 32, warps=8, stages=4),
        GemmConfig(128, 64, 32, warps=4, stages=4),
        GemmConfig(64, 64, 64, warps=4, stages=3),
        GemmConfig(64, 32, 128, warps=4, stages=3),
    ),
    "tf32": (
        GemmConfig(128, 128, 32, warps=8, stages=2),
        GemmConfig(64, 64, 32, warps=4, stages=4),
        GemmConfig(32, 32, 32, warps=4, stages=4),
    ),
    "float32": _FLOAT32_GEMM,
}
_HOPPER_GEMM = {
    "16-bit": (
        GemmConfig(128, 256, 64, warps=8, stages=3, descriptors=True),
        GemmConfig(128, 128, 64, warps=8, stages=4, descriptors=True),
        GemmConfig(128, 64, 64, warps=4, stages=4, descriptors=True),
        GemmConfig(64, 64, 64, warps=4, stages=4, descriptors=True),
        GemmConfig(64, 32, 128, warps=4, stages=4, descriptors=True),
    ),
    "tf32": (
        GemmConfig(128, 128, 32, warps=8, stages=4, descriptors=True),
        GemmConfig(64, 64, 32, warps=4, stages=4, descriptors=True),
        GemmConfig(32, 32, 64, warps=4, stages=4, descriptors=True),
    ),
    "float32": _FLOAT32_GEMM,
}
_AMD_GEMM = {
    "16-bit": (
        GemmConfig(128, 128, 64, warps=8, stages=2),
        GemmConfig(64, 64, 64, warps=4, stages=2),
        GemmConfig(64, 32, 64, warps=4, stages=2),
    ),
    "tf32": (
        GemmConfig(128, 64, 32, warps=8, stages=2),
        GemmConfig(64, 64, 32, warps=4, stages=2),
        GemmConfig(64, 32, 64, warps=4, stages=2),
        GemmConfig(16, 64, 64, warps=4, stages=2),
    ),
    "float32": (
        GemmConfig(64, 64, 32, warps=8, stages=2),
        GemmConfig(16, 32, 64, warps=4, stages=2),
    ),
}

# Of those that hold all rows, up to FEW_ROWS, the first that fills the device.
# From compilation for sm_90: with eight warps each has fewer codes to turn into numbers than with
# four, and two are there for every scheduler.
_PACKED_16 = (
    GemmConfig(64, 64, 64, warps=8, stages=3),
    GemmConfig(64, 32, 128, warps=8, stages=3),
    GemmConfig(16, 64, 128, warps=8, stages=3),
    GemmConfig(16, 32, 256, warps=8, stages=3),
    GemmConfig(16, 32, 64, warps=4, stages=2),
)
_PACKED_32 = (
    GemmConfig(64, 32, 32, warps=4, stages=3),
    GemmConfig(16, 32, 32, warps=4, stages=3),
)
_PACKED = {"16-bit": _PACKED_16, "tf32": _PACKED_32, "float32": _PACKED_32}
_AMD_PACKED = dict.fromkeys(
    PRODUCTS,
    (
        GemmConfig(64, 32, 64, warps=4, stages=2),
        GemmConfig(16, 32, 128, warps=4, stages=2),
        GemmConfig(16, 32, 64, warps=4, stages=2),
    ),
)

# The first that fits, of all the others: one for all numbers of rows.  The low-rank term alone has
# no main loop and waits for memory, so it wants several small programs for each processor.
_LOWRANK = (
    # From compilation: 80 instructions a KiB of the output, 230 masked; by 8 warps 120 and 288.
    LowRankConfig(64, 128, warps=4),
    LowRankConfig(64, 64, warps=4),
    LowRankConfig(32, 64, warps=4),
    LowRankConfig(16, 64, warps=4),
    LowRankConfig(16, 32, warps=4),
)
# From compilation: the masks of three projections take 131 registers of 64x128's eight warps, which
# leaves room for one program a processor, and for three of these.
_LOWRANK_MASKED_GROUP = (LowRankConfig(64, 64, warps=4), *_LOWRANK[2:])
# Eight warps, or two programs a processor: from compilation, four warps' barriers and casts of a
# 64x64 step take about as long as memory does.
_PROJECT = (
    ProjectConfig(64, 128, warps=8, stages=4),
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
# Narrow, since a split of the rows costs a plane of partial sums.  From compilation for sm_90, all
# loads go by cp.async, stages ahead.
_WEIGHT_GRAD = {
    "16-bit": (
        WeightGradConfig(128, 32, warps=8, stages=4),
        WeightGradConfig(64, 32, warps=4, stages=4),
        WeightGradConfig(32, 32, warps=4, stages=4),
    ),
    "tf32": (
        WeightGradConfig(64, 32, warps=8, stages=4),
        WeightGradConfig(32, 32, warps=4, stages=3),
    ),
    "float32": (
        WeightGradConfig(32, 32, warps=4, stages=3),
        WeightGradConfig(16, 32, warps=4, stages=3),
    ),
}
# From compilation for sm_80 (Triton 3.9): with four masks of rank 64, 128 rows spill in the loop.
_WEIGHT_GRAD_MASKED_GROUP = _WEIGHT_GRAD | {
    "16-bit": (WeightGradConfig(64, 32, warps=8, stages=4), *_WEIGHT_GRAD["16-bit"][1:]),
}
_AMD_WEIGHT_GRAD = {
    "16-bit": (
        WeightGradConfig(64, 32, warps=4, stages=2),
        WeightGradConfig(32, 32, warps=4, stages=2),
    ),
    "tf32": (
        WeightGradConfig(64, 32, warps=4, stages=2),
        WeightGradConfig(32, 32, warps=4, stages=2),
    ),
}
_AMD_WEIGHT_GRAD["float32"] = _AMD_WEIGHT_GRAD["tf32"]
# Wide, since every tile of columns leaves a plane of dh.
_ONE_PASS = {
    "16-bit": (
        WeightGradConfig(32, 512, warps=8, stages=3),
        WeightGradConfig(64, 256, warps=8, stages=3),
        WeightGradConfig(64, 128, warps=8, stages=3),
        WeightGradConfig(64, 64, warps=4, stages=4),
        WeightGradConfig(32, 32, warps=4, stages=2),
    ),
    "tf32": (
        WeightGradConfig(32, 256, warps=8, stages=3),
        WeightGradConfig(32, 128, warps=8, stages=3),
        WeightGradConfig(32, 64, warps=4, stages=4),
        WeightGradConfig(32, 32, warps=4, stages=3),
    ),
    "float32": (
        WeightGradConfig(32, 64, warps=4, stages=3),
        WeightGradConfig(16, 32, warps=4, stages=3),
    ),
}
# Both products of a tile are Hopper's own (weight_grad.py), and two programs fit a processor.
_HOPPER_ONE_PASS = {
    "16-bit": _ONE_PASS["16-bit"][1:4],
    "tf32": (
        WeightGradConfig(64, 128, warps=8, stages=3),
        WeightGradConfig(64, 64, warps=4, stages=3),
    ),
    "float32": _ONE_PASS["float32"],
}
_AMD_ONE_PASS = {
    "16-bit": (
        WeightGradConfig(32, 256, warps=8, stages=2),
        WeightGradConfig(64, 128, warps=4, stages=2),
        *_AMD_WEIGHT_GRAD["16-bit"],
    ),
    "tf32": (
        WeightGradConfig(64, 128, warps=4, stages=2),
        WeightGradConfig(64, 64, warps=4, stages=2),
        WeightGradConfig(32, 32, warps=4, stages=2),
    ),
}
_AMD_ONE_PASS["float32"] = _AMD_ONE_PASS["tf32"]


def _for_all(*rows: Config) -> dict[str, tuple[Config, ...]]:
    """The same rows for every product."""
    return dict.fromkeys(PRODUCTS, rows)


def _deeper(table: dict, stages: int) -> dict:
    """The table, with so many stages in the first row for 16 bits, before the row as it was."""
    first = table["16-bit"][0]
    return table | {"16-bit": (replace(first, stages=stages), *table["16-bit"])}


_AMPERE = {
    "gemm_lowrank": _AMPERE_GEMM,
    "packed": _PACKED,
    "lowrank": _for_all(*_LOWRANK),
    "lowrank of a masked group": _for_all(*_LOWRANK_MASKED_GROUP),
    # Exact float32 has no tensor cores, and spills in the first.
    "project": _for_all(*_PROJECT) | {"float32": _PROJECT[1:]},
    "weight_grad": _WEIGHT_GRAD,
    "weight_grad of a masked group": _WEIGHT_GRAD_MASKED_GROUP,
    "one pass": _ONE_PASS,
}
_HOPPER = _AMPERE | {
    "gemm_lowrank": _HOPPER_GEMM,
    "one pass": _HOPPER_ONE_PASS,
    # More stages, so that enough bytes are under way: from compilation, in the same loop.
    "weight_grad": _deeper(_WEIGHT_GRAD, 6),
    "weight_grad of a masked group": _deeper(_WEIGHT_GRAD_MASKED_GROUP, 8),
}
# One step over the rank isn't worth a way through tensor memory, which takes 64 rows.
_BLACKWELL = _HOPPER | {
    "lowrank": _for_all(LowRankConfig(32, 128, warps=4), *_LOWRANK[2:]),
}
_AMD = _AMPERE | {
    "gemm_lowrank": _AMD_GEMM,
    "packed": _AMD_PACKED,
    "project": _for_all(*_AMD_PROJECT),
    "weight_grad": _AMD_WEIGHT_GRAD,
    "weight_grad of a masked group": _AMD_WEIGHT_GRAD,
    "one pass": _AMD_ONE_PASS,
}
# One stage: faults.py says why.
_GFX950 = {
    kernel: {
        product: tuple(dict.fromkeys(replace(config, stages=1) for config in rows))
        for product, rows in table.items()
    }
    for kernel, table in _AMD.items()
}
_SMALL_GEMM = _for_all(GemmConfig(32, 32, 16, warps=4, stages=2, group=2, descriptors=True))
_INTERPRETED = {
    "gemm_lowrank": _SMALL_GEMM,
    "packed": _SMALL_GEMM,
    "lowrank": _for_all(LowRankConfig(32, 32, warps=4, group=2)),
    "lowrank of a masked group": _for_all(LowRankConfig(32, 32, warps=4, group=2)),
    "project": _for_all(ProjectConfig(32, 32, warps=4, stages=2)),
    "weight_grad": _for_all(WeightGradConfig(32, 32, warps=4, stages=2)),
    "weight_grad of a masked group": _for_all(WeightGradConfig(32, 32, warps=4, stages=2)),
    "one pass": _for_all(WeightGradConfig(32, 64, warps=4, stages=2)),
}
for _names, _tables in (
    (("sm_80", "sm_86", "sm_120"), _AMPERE),
    (("sm_90",), _HOPPER),
    (("sm_100",), _BLACKWELL),
    (("gfx942", "gfx11"), _AMD),
    (("gfx950",), _GFX950),
    (("interpreter",), _INTERPRETED),
):
    DEFAULTS.update({(name, kernel): rows for name in _names for kernel, rows in _tables.items()})
