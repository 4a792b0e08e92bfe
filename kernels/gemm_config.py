"""Tiles of a base product with its low-rank term, and what they cost a device."""

from dataclasses import dataclass

from .config import MARGIN, Call, Config, cdiv, power_of_two
from .faults import unpacks_wrong
from .lowrank import loads_at_once, rank_step
from .target import Target


@dataclass(frozen=True)
class GemmConfig(Config):
    """Tiles of ``gemm_lowrank``: OUT in block_m x block_n, in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8  # rows of tiles that go together, for the L2 cache
    descriptors: bool = False  # load by tensor descriptor (TMA) where the operands allow it

    def block_r(self, call: Call) -> int:
        return rank_step(call.r)

    def uses_descriptors(self, call: Call) -> bool:
        return self.descriptors and not call.pointers

    def low_rank(self, target: Target, call: Call) -> str:
        """Where the low-rank term goes: the kernel's LOW_RANK."""
        if call.project:
            return "made"
        if call.masked:
            return "first"
        return "early" if loads_at_once(target, call) else "last"

    def tiles(self, call: Call) -> int:
        return call.row_tiles(self.block_m) * cdiv(call.n, self.block_n)

    def sums(self, call: Call) -> int:
        # A masked group has products at hand beside its sum; from compilation, two for four.
        outs = 1 + call.masked * call.projections // 2
        if not self.uses_descriptors(call):
            # Addresses take registers, too: of ragged rows as many as there are elements.
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
            low_rank *= 2  # as loaded, and as tensor cores read it
        store = self.block_m * self.block_n * size
        step = (self.block_m + self.block_n) * self.block_k * size
        step += call.project * self.block_k * r * 4
        if call.packed:  # codes wait, and the numbers that they become are handed round
            low_rank += self.block_n * self.block_k * (size + 4)
        if self.uses_descriptors(call) and not call.segments:
            # Half of the tile is stored from beside the main loop's buffers.
            return copies * step + low_rank + store // 2 + MARGIN
        return max(copies * step + low_rank, store) + MARGIN

    def why_not(self, target: Target, call: Call) -> str:
        if call.packed and call.itemsize == 4 and unpacks_wrong(target, self.block_m):
            return f"tiles of {self.block_m} rows of a packed weight in float32"
        return super().why_not(target, call)

    def tensor_memory(self, target: Target, call: Call) -> int:
        if not target.tensor_memory:
            return 0
        # For every product two sums, before and after a step.
        sums = self.block_n * power_of_two(2 * call.projections)
        return sums + call.project * self.block_r(call)
