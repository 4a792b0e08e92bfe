"""Faults of compilers and drivers, by version: callers avoid a case if its predicate is true.

A fault in all versions, or one that costs nothing to avoid, has no predicate here: a comment names
it where the code avoids it.
"""

import re
from functools import cache

import triton

from .target import Target

# Reported faults that were examined, and that no code here avoids.  "The machine" is
# tools/machine, which runs compiled PTX on a CPU.
# * Illegal reads with several products of 32 columns and 4 warps (sm_90; 3.7.1; triton#11366,
#   #10486).  `project` with groups and `weight_grad` have such products.  On the machine, all their
#   addresses are valid.
# * `warpgroup_mma_wait` waits for only one group of 4 warps (triton#11047, #9484, #9497, #11050);
#   8 warps are two groups.  On the machine, no group's operands are overwritten.
# * Results that change from run to run where a loop's end is loaded from memory (sm_100; 3.6;
#   triton#9871).  Segments load their ends; no sm_100 has run them.

TRITON = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])


@cache
def ptxas(arch: int) -> tuple[int, ...]:
    """The version of Triton's ptxas (assembler) for this architecture; () if there is none."""
    knobs = triton.knobs.nvidia
    try:
        tool = knobs.ptxas if arch < 100 else knobs.ptxas_blackwell
        return tuple(int(number) for number in tool.version.split("."))
    except (AttributeError, OSError, RuntimeError, ValueError):
        return ()


def overwrites_operands(target: Target) -> bool:
    """Whether ptxas (before 13.3) may overwrite registers that a ``wgmma`` still reads."""
    return target.arch == 90 and target.kind == "cuda" and ptxas(90) < (13, 3)


def overwrites_tiles(target: Target, kept: int, used: int) -> bool:
    """Whether a loop overwrites a loaded tile while the first of its two products still reads it.

    ``kept``: the rows of the product that adds to sums which the loop keeps.  ``used``: the rows of
    the product whose result the same step uses.  A product of 64 rows or more is a ``wgmma``, which
    runs while the loop goes on.  Triton (3.6 to 3.9) relies on the second product to wait for both,
    but a product of fewer rows isn't a ``wgmma`` and has no wait.
    """
    return target.kind == "cuda" and target.arch == 90 and used < 64 <= kept


def races_when_turned(target: Target, precision: str, itemsize: int) -> bool:
    """Whether loading a TF32 operand by descriptor races if the axis K isn't its last.

    The tensor cores of sm_100 (tcgen05) need such tiles transposed.  Triton (3.6 to 3.9) transposes
    them in one buffer, and writes the next tile to it while the previous product still reads it.
    """
    return target.tensor_memory > 0 and precision == "tf32" and itemsize == 4


def unpacks_wrong(target: Target, block_m: int) -> bool:
    """Whether a packed weight's product in float32 fails with tiles of ``block_m`` rows.

    Products of 64 rows or more are wgmma or tcgen05.  Triton (3.6 to 3.9) can't compile dx with
    four-bit codes in TF32 ("Illegal shared layout").  Before 3.8, it computes in TF32 on sm_100
    where exact float32 was requested.
    """
    return target.kind == "cuda" and target.descriptors and block_m >= 64


def miscompiles_pipelines(target: Target) -> bool:
    """Whether loops over K with two or more stages give wrong results: aiter#4163, #5428."""
    return target.arch == "gfx950"


def small_views_fault(target: Target) -> bool:
    """Whether a descriptor of a non-contiguous view under 128 KiB may fault: triton#9235, < 3.7."""
    return target.kind == "cuda" and target.tensor_memory > 0 and TRITON < (3, 7)
