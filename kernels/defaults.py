"""The default configs: for each architecture and kernel, a table of configs for each product.

No GPU has measured them.  They were chosen by what compiles (`make compile-report`): tensor-core
instructions, no spill inside a loop, and, on paper, enough bytes in flight to keep memory busy.
"From compilation" in a comment refers to that report.  ``config.default_config`` chooses a call's
config from its table, by a cost model that no GPU has measured either; ``fastlora tune`` replaces
the choice by a measured one.

A config's word: ``128x64x32-w8-s4`` has tiles of 128 x 64 x 32, 8 warps and 4 stages.  ``-tma``:
loads by descriptor.  ``-r256``: a program's tiles of all U_i have at most 256 columns together
(``ThinConfig.width``).
"""

from dataclasses import replace

from .config import DEFAULTS, Config
from .gemm_config import GemmConfig
from .lowrank import LowRankConfig
from .project import ProjectConfig
from .weight_grad import WeightGradConfig

PRODUCTS = ("16-bit", "tf32", "float32")
Table = dict[str, tuple[Config, ...]]


def _table(kind: type[Config], *words: str) -> Table:
    """A table from strings of words, one string for each of PRODUCTS.

    With fewer strings, the last also serves the remaining products.
    """
    rows = [tuple(map(kind.of, each.split())) for each in words]
    return dict(zip(PRODUCTS, [*rows, rows[-1], rows[-1]], strict=False))


# From large tiles to small.  Calls with few rows take a config whose tiles have at most FEW_ROWS.
_FLOAT32_GEMM = "64x64x16-w8-s3 32x32x32-w4-s3 16x32x32-w4-s2"
_AMPERE_GEMM = (
    "128x128x32-w8-s4 128x64x32-w4-s4 64x64x64-w4-s3 64x32x128-w4-s3",
    "128x128x32-w8-s2 64x64x32-w4-s4 32x32x32-w4-s4",
    _FLOAT32_GEMM,
)
_HOPPER_GEMM = (
    "128x256x64-w8-s3-tma 128x128x64-w8-s4-tma 128x64x64-w4-s4-tma 64x64x64-w4-s4-tma "
    "64x32x128-w4-s4-tma",
    "128x128x32-w8-s4-tma 64x64x32-w4-s4-tma 32x32x64-w4-s4-tma",
    _FLOAT32_GEMM,
)
# One tile has to hold all rows, up to FEW_ROWS.  Among configs with such tiles, the first with a
# tile for nearly every processor is chosen.  From compilation for sm_90: with eight warps instead
# of four, a warp converts half as many codes, and each of the four schedulers has two warps to
# switch between.
_PACKED = "64x64x64-w8-s3 64x32x128-w8-s3 16x64x128-w8-s3 16x32x256-w8-s3 16x32x64-w4-s2"
# Int8 products: for 16-bit x, for float32 x in TF32, and exact.
_INT8_32 = ("64x64x64-w8-s3 16x64x128-w4-s3", "32x64x64-w8-s3 16x64x128-w4-s3")
_INT8 = ("128x128x64-w8-s4 64x64x128-w4-s3 16x64x128-w4-s3", *_INT8_32)
# From compilation: the rotation's matrix takes 64 registers, and with larger tiles it spills.  On
# Hopper and newer, it is in shared memory.
_ROTATED = ("128x64x64-w8-s4 64x64x128-w8-s3 16x64x128-w4-s3", *_INT8_32)
_HOPPER_ROTATED = (
    "128x128x128-w8-s4-tma 128x64x128-w8-s4-tma 64x64x128-w4-s4-tma 16x64x128-w4-s3", *_INT8_32
)  # fmt: skip
_HOPPER_INT8 = (f"128x256x128-w8-s3-tma {_HOPPER_ROTATED[0]}", *_INT8_32)
# The low-rank term without a base product has no main loop and waits for memory, so several small
# programs should share a processor.  From compilation, each KiB of the output takes 80
# instructions, or 230 with a mask (120 and 288 with 8 warps).  With three masks, it takes 440
# instructions, or 620 in tiles of 64x64.
_LOWRANK = "64x64-w4-s1 32x64-w4-s1 16x64-w4-s1 16x32-w4-s1"
_WIDE_LOWRANK = f"64x128-w4-s1 128x128-w8-s1 {_LOWRANK}"
# A processor should have eight warps, in one program or in two.  From compilation, the barriers and
# casts of a 64x64 step take four warps about as long as memory takes to deliver the step's bytes.
_LOW_PROJECT = "32x64-w4-s6 16x128-w4-s4 16x64-w4-s3 16x32-w4-s3"
_PROJECT = f"64x64-w8-s4 {_LOW_PROJECT}"
_WIDE_PROJECT = "128x32-w8-s4-r256 128x32-w8-s3-r256"
_MASKED_PROJECT = f"64x64-w8-s4 {_WIDE_PROJECT} {_LOW_PROJECT}"
# Narrow tiles make enough programs without splitting the rows; a split costs a plane of partial
# sums.  From compilation for sm_90: all loads are asynchronous (cp.async) and run stages ahead.
# With four masks of rank 64, a step of 128 rows spills in the loop.
_WEIGHT_GRAD = "64x32-w4-s4 32x32-w4-s4"
_WIDE_WEIGHT_GRAD = "32x128-w8-s4-r256"
_WEIGHT_GRAD_32 = ("64x32-w8-s4 32x32-w4-s3", "32x32-w4-s3 16x32-w4-s3")
# One pass over x.  From compilation, three masks of one step fit into registers.  The tiles are as
# narrow as weight_grad's other tiles, so that the same number of columns needs no more planes.
_WITH_LOW_RANK = "64x32-w8-s4 32x32-w8-s4-r256 32x32-w4-s3"
# One pass over dy.  The tiles are wide, because every tile of columns writes a plane of dh.
_ONE_PASS_FLOAT32 = "32x64-w4-s3 16x32-w4-s3"

_AMPERE = {
    "gemm_lowrank": _table(GemmConfig, *_AMPERE_GEMM),
    "gemm_lowrank of int8": _table(GemmConfig, *_INT8),
    "gemm_lowrank of rotated int8": _table(GemmConfig, *_ROTATED),
    "packed": _table(GemmConfig, _PACKED, "64x32x32-w4-s3 16x32x32-w4-s3"),
    "lowrank": _table(LowRankConfig, _WIDE_LOWRANK, f"64x128-w4-s1 {_LOWRANK}"),
    "lowrank of a masked group": _table(LowRankConfig, _WIDE_LOWRANK, _LOWRANK),
    # Three stages, so that two masked programs fit sm_80's shared memory.  Exact float32 runs
    # without tensor cores and would spill in the first config.
    "project": _table(
        ProjectConfig,
        f"64x128-w8-s3 {_WIDE_PROJECT} {_PROJECT}",
        f"64x128-w8-s4 {_PROJECT}",
        _PROJECT,
    ),
    "project of a masked group": _table(ProjectConfig, _MASKED_PROJECT, _PROJECT),
    "weight_grad": _table(
        WeightGradConfig,
        f"128x32-w8-s4 64x64-w8-s4-r256 {_WIDE_WEIGHT_GRAD} {_WEIGHT_GRAD}",
        *_WEIGHT_GRAD_32,
    ),
    "weight_grad of a masked group": _table(
        WeightGradConfig,
        f"64x32-w8-s4 64x64-w8-s4-r256 {_WIDE_WEIGHT_GRAD} {_WEIGHT_GRAD}",
        *_WEIGHT_GRAD_32,
    ),
    "one pass": _table(
        WeightGradConfig,
        "32x512-w8-s3 64x256-w8-s3 64x128-w8-s3 64x64-w4-s4 32x32-w4-s2",
        "32x256-w8-s3 32x128-w8-s3 32x64-w4-s4 32x32-w4-s3",
        _ONE_PASS_FLOAT32,
    ),
    "one pass over x": _table(WeightGradConfig, _WITH_LOW_RANK, "32x32-w4-s3", "16x32-w4-s3"),
}
# From compilation: two programs with these tiles fit a processor, and masks take fewer
# instructions.
_A100 = _AMPERE | {
    "gemm_lowrank": _table(GemmConfig, f"128x256x64-w8-s3 {_AMPERE_GEMM[0]}", *_AMPERE_GEMM[1:]),
    "project of a masked group": _table(ProjectConfig, f"{_WIDE_PROJECT} {_PROJECT}", _PROJECT),
    "weight_grad of a masked group": _table(
        WeightGradConfig,
        f"32x64-w8-s4-r256 {_WIDE_WEIGHT_GRAD} 64x32-w8-s4 {_WEIGHT_GRAD}",
        *_WEIGHT_GRAD_32,
    ),
}
_HOPPER = _AMPERE | {
    "gemm_lowrank": _table(GemmConfig, *_HOPPER_GEMM),
    "gemm_lowrank of int8": _table(GemmConfig, *_HOPPER_INT8),
    "gemm_lowrank of rotated int8": _table(GemmConfig, *_HOPPER_ROTATED),
    # In float32 the tiles have 16 rows, because larger tiles fail: faults.unpacks_wrong.
    "packed": _table(GemmConfig, _PACKED, "16x32x32-w4-s3"),
    "project": _table(
        ProjectConfig,
        f"64x128-w8-s4 128x64-w8-s3-r256 {_WIDE_PROJECT} {_PROJECT}",
        f"64x128-w8-s4 {_PROJECT}",
        _PROJECT,
    ),
    # More stages keep more bytes in flight; from compilation, the loop's instructions are the same.
    "weight_grad": _table(
        WeightGradConfig,
        f"128x32-w8-s6 128x32-w8-s4 64x64-w8-s6-r256 {_WIDE_WEIGHT_GRAD} {_WEIGHT_GRAD}",
        *_WEIGHT_GRAD_32,
    ),
    "weight_grad of a masked group": _table(
        WeightGradConfig,
        f"32x64-w8-s6-r256 {_WIDE_WEIGHT_GRAD} 64x32-w8-s4 {_WEIGHT_GRAD}",
        *_WEIGHT_GRAD_32,
    ),
    # With 64 rows, both products of a step are wgmma instructions (WeightGradConfig.why_not), and
    # two programs fit a processor.
    "one pass": _table(
        WeightGradConfig,
        "64x256-w8-s3 64x128-w8-s3 64x64-w4-s4",
        "64x128-w8-s3 64x64-w4-s3",
        _ONE_PASS_FLOAT32,
    ),
    "one pass over x": _table(
        WeightGradConfig,
        # The last configs serve calls where the others race (faults.overwrites_tiles): ranks 33 to
        # 64 with 3 and 4 projections, and TF32.
        f"{_WITH_LOW_RANK} 64x32-w8-s3-r256",
        "32x32-w4-s3 64x32-w8-s3",
        "16x32-w4-s3",
    ),
}
# Tiles of 64 rows would move their sums through tensor memory, which a single step over a small
# rank doesn't repay.
_SHALLOW_LOWRANK = f"32x128-w4-s1 128x128-w8-s1 {_LOWRANK.partition(' ')[2]}"
_BLACKWELL = _HOPPER | {
    "lowrank": _table(LowRankConfig, _SHALLOW_LOWRANK),
    "one pass over x": _AMPERE["one pass over x"],
}

_AMD_PROJECT = _table(ProjectConfig, "64x64-w4-s2 16x128-w4-s2 16x64-w4-s2 16x16-w4-s2")
_AMD_WEIGHT_GRAD = _table(WeightGradConfig, "64x32-w4-s2 32x32-w4-s2")
_AMD = _AMPERE | {
    "gemm_lowrank": _table(
        GemmConfig,
        "128x128x64-w8-s2 64x64x64-w4-s2 64x32x64-w4-s2",
        "128x64x32-w8-s2 64x64x32-w4-s2 64x32x64-w4-s2 16x64x64-w4-s2",
        "64x64x32-w8-s2 16x32x64-w4-s2",
    ),
    "gemm_lowrank of int8": _table(GemmConfig, "128x128x64-w8-s2 64x64x64-w4-s2 16x64x64-w4-s2"),
    "gemm_lowrank of rotated int8": _table(GemmConfig, "64x64x64-w4-s2 16x64x64-w4-s2"),
    "packed": _table(GemmConfig, "64x32x64-w4-s2 16x32x128-w4-s2 16x32x64-w4-s2"),
    "lowrank": _table(LowRankConfig, f"64x128-w4-s1 {_LOWRANK}"),
    "lowrank of a masked group": _table(LowRankConfig, _LOWRANK),
    "project": _AMD_PROJECT,
    "project of a masked group": _AMD_PROJECT,
    "weight_grad": _AMD_WEIGHT_GRAD,
    "weight_grad of a masked group": _AMD_WEIGHT_GRAD,
    "one pass": _table(
        WeightGradConfig,
        "32x256-w8-s2 64x128-w4-s2 64x32-w4-s2 32x32-w4-s2",
        "64x128-w4-s2 64x64-w4-s2 32x32-w4-s2",
    ),
    "one pass over x": _AMD_WEIGHT_GRAD,
}
# One stage, because Triton miscompiles pipelined loops there: faults.miscompiles_pipelines.
_GFX950 = {
    kernel: {
        product: tuple(dict.fromkeys(replace(config, stages=1) for config in rows))
        for product, rows in table.items()
    }
    for kernel, table in _AMD.items()
}
# The interpreter's tiles are small, so that small shapes in tests have several tiles.
_SMALL_GEMM = _table(GemmConfig, "32x32x16-w4-s2-g2-tma")
_SMALL_INT8 = _table(GemmConfig, "32x64x32-w4-s2-g2-tma")
_SMALL_LOWRANK = _table(LowRankConfig, "32x32-w4-s1-g2")
_SMALL_PROJECT = _table(ProjectConfig, "32x32-w4-s2")
_SMALL_WEIGHT_GRAD = _table(WeightGradConfig, "32x32-w4-s2")
_INTERPRETED = {
    "gemm_lowrank": _SMALL_GEMM,
    "gemm_lowrank of int8": _SMALL_INT8,
    "gemm_lowrank of rotated int8": _SMALL_INT8,
    "packed": _SMALL_GEMM,
    "lowrank": _SMALL_LOWRANK,
    "lowrank of a masked group": _SMALL_LOWRANK,
    "project": _SMALL_PROJECT,
    "project of a masked group": _SMALL_PROJECT,
    "weight_grad": _SMALL_WEIGHT_GRAD,
    "weight_grad of a masked group": _SMALL_WEIGHT_GRAD,
    "one pass": _table(WeightGradConfig, "32x64-w4-s2"),
    "one pass over x": _SMALL_WEIGHT_GRAD,
}
for _names, _tables in (
    (("sm_80",), _A100),
    (("sm_86", "sm_120"), _AMPERE),
    (("sm_90",), _HOPPER),
    (("sm_100",), _BLACKWELL),
    (("gfx942", "gfx11"), _AMD),
    (("gfx950",), _GFX950),
    (("interpreter",), _INTERPRETED),
):
    DEFAULTS.update({(name, kernel): rows for name in _names for kernel, rows in _tables.items()})
