"""The config of the kernels with a base product: tiles, and their cost in registers and memory.

These costs decide what fits a target (``why_not``) and how many tiles there are.  They are
estimates that compilation has checked (``make compile-report``) and no GPU has measured.
"""

from dataclasses import dataclass

from .config import MARGIN, Call, Config, cdiv, power_of_two
from .faults import unpacks_wrong
from .lowrank import loads_at_once, rank_step
from .target import Target


@dataclass(frozen=True)
class GemmConfig(Config):
    """Tiles of a base product: OUT is cut into block_m x block_n, its depth K into block_k."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8  # rows of tiles that advance together and share L2 (common.tile_of)
    descriptors: bool = False  # load by tensor descriptor (TMA) where the operands allow it

    def block_r(self, call: Call) -> int:
        return rank_step(call.r)

    def uses_descriptors(self, call: Call) -> bool:
        return self.descriptors and not call.pointers

    def low_rank(self, target: Target, call: Call) -> str:
        """LOW_RANK of ``gemm_lowrank_kernel``: where it computes the low-rank term."""
        if call.masked:
            return "before"
        return "prefetched" if loads_at_once(target, call) else "after"

    def tiles(self, call: Call) -> int:
        return call.row_tiles(self.block_m) * cdiv(call.n, self.block_n)

    def sums(self, call: Call) -> int:
        # Besides the output's sum, a masked group holds products that wait for their masks.  From
        # compilation: two for four projections.
        outs = 1 + call.masked * call.projections // 2
        # Each int8 product has integer sums of its own, beside the float32 sum of all.
        outs += bool(call.int8) * (call.projections > 1)
        if not self.uses_descriptors(call):
            # Addresses also take registers.  If 16 doesn't divide the columns, each element has an
            # address of its own.
            ragged = call.pointers or call.n % 16 > 0
            is_least = call.projections == 1 and call.r <= self.block_r(call)
            outs = outs + 2 if ragged else max(outs, 2 - is_least)
        return self.block_m * (outs * self.block_n + call.project * self.block_r(call))

    def shared_memory(self, target: Target, call: Call) -> int:
        r, size, copies = self.block_r(call), call.itemsize, target.copies(self.stages)
        low_rank = (self.block_m + self.block_n) * r * size
        if loads_at_once(target, call):
            low_rank *= call.projections
        if call.masked and size == 4:
            low_rank *= 2  # one copy as loaded, one in the layout that tensor cores read
        # The output's tile passes through shared memory before it is stored.
        is_rotated = call.int8 == "rotated int8"
        store = self.block_m * self.block_n * (4 if is_rotated else size)
        step = (self.block_m + self.block_n) * self.block_k * (1 if call.int8 else size)
        step += call.project * self.block_k * r * 4  # A's tile, float32
        low_rank += 64 * 64 * size * is_rotated  # the matrix of the rotation
        if call.packed:  # a buffer for loaded codes, and one to exchange the unpacked numbers
            low_rank += self.block_n * self.block_k * (size + 4)
        if self.uses_descriptors(call) and not call.segments:
            # A persistent program keeps the main loop's buffers while it stores half a tile.
            return copies * step + low_rank + store // 2 + MARGIN
        # Otherwise the store reuses the main loop's buffers.
        return max(copies * step + low_rank, store) + MARGIN

    def why_not(self, target: Target, call: Call) -> str:
        if call.packed and call.itemsize == 4 and unpacks_wrong(target, self.block_m):
            return f"Triton fails on a packed weight in float32 with tiles of {self.block_m} rows"
        if call.int8 and (self.block_n % 64 or self.block_k < 32):
            return "int8 products have steps of at least 32, and 64 columns are rotated at once"
        return super().why_not(target, call)

    def tensor_memory(self, target: Target, call: Call) -> int:
        if not target.tensor_memory:
            return 0
        # Two accumulators for every product: one before and one after a step.
        sums = self.block_n * power_of_two(2 * call.projections)
        return sums + call.project * self.block_r(call)
