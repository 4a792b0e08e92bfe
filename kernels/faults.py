"""Faults of compilers and drivers, by version, and what goes around each.

docs/kernels.md tells what they do and how they were found.  A fault that every version has, or
that costs nothing to go around, has no switch: the code there names it.
"""

import re
from functools import cache

import triton

from .target import Target

# Looked at, and gone around by nothing:
# * illegal reads with several products of 32 columns and 4 warps (sm_90; 3.7.1; triton#11366,
#   #10486): `project` of groups and `weight_grad` are such; on the machine all addresses stay
#   inside.
# * `warpgroup_mma_wait` waits for one group of 4 warps (triton#11047, #9484, #9497, #11050): 8
#   warps are two; on the machine no group's operands are overwritten.
# * Other bits from run to run where a loop's end is loaded (sm_100; 3.6; triton#9871): segments
#   load theirs; no sm_100 has run them.

TRITON = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])


@cache
def ptxas(arch: int) -> tuple[int, ...]:
    """The version of the assembler that Triton takes for this architecture; () if it has none."""
    knobs = triton.knobs.nvidia
    try:
        tool = knobs.ptxas if arch < 100 else knobs.ptxas_blackwell
        return tuple(int(number) for number in tool.version.split("."))
    except (AttributeError, OSError, RuntimeError, ValueError):
        return ()


def overwrites_operands(target: Target) -> bool:
    """Whether registers that a ``wgmma`` still reads may be written: ptxas before 13.3."""
    return target.arch == 90 and target.kind == "cuda" and ptxas(90) < (13, 3)


def overwrites_tiles(target: Target, kept: int, used: int) -> bool:
    """Whether a loop overwrites a loaded tile while the first of its two products still reads it.

    ``kept``: the rows of the product whose sums the loop keeps.  ``used``: the rows of the product
    whose result the step uses.  A product of 64 rows or more is a ``wgmma``, which runs while the
    loop goes on.  Triton (3.6 to 3.9) relies on the wait of the second product, but a product of
    fewer rows has no wait.
    """
    return target.kind == "cuda" and target.arch == 90 and used < 64 <= kept


def races_when_turned(target: Target, precision: str, itemsize: int) -> bool:
    """Whether a TF32 operand by descriptor, whose depth isn't its last axis, races: tcgen05.

    Triton (3.6 to 3.9) turns its tiles over in one buffer, into which the next one goes too early.
    """
    return target.tensor_memory > 0 and precision == "tf32" and itemsize == 4


def unpacks_wrong(target: Target, block_m: int) -> bool:
    """Whether a packed weight's product in float32 fails with tiles of so many rows.

    From 64 rows on they are for wgmma and tcgen05.  Triton (3.6 to 3.9) gives up a dx of four bits
    in TF32 ("Illegal shared layout"), and before 3.8 takes exact float32 for TF32 on sm_100.
    """
    return target.kind == "cuda" and target.descriptors and block_m >= 64


def miscompiles_pipelines(target: Target) -> bool:
    """Whether loops over K with two stages or more come out wrong: aiter#4163, #5428."""
    return target.arch == "gfx950"


def small_views_fault(target: Target) -> bool:
    """Whether a descriptor of a sparse view below 128 KiB may fault: triton#9235, before 3.7."""
    return target.kind == "cuda" and target.tensor_memory > 0 and TRITON < (3, 7)
