"""Tiles of a base product with its low-rank term, and what they cost a device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .config import MARGIN, Call, Config, cdiv, power_of_two
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
        # Of a rank that 16 doesn't divide, Triton may load every element by itself, with a pointer.
        most = 64 if call.r <= 64 else 32 if call.r % 16 == 0 else 16
        return min(max(16, power_of_two(call.r)), most)

    def uses_descriptors(self, call: Call) -> bool:
        return self.descriptors and not call.pointers

    def low_rank(self, target: Target, call: Call) -> str:
        """Where the low-rank term goes: the kernel's LOW_RANK.

        "early" tiles wait in shared memory on Hopper and newer, elsewhere in registers, which few
        fit into.
        """
        if call.project:
            return "made"
        if call.masked:
            return "first"
        wait = target.descriptors or call.r * call.projections <= 16
        return "early" if call.r <= self.block_r(call) and wait else "last"

    def tiles(self, call: Call) -> int:
        return call.row_tiles(self.block_m) * cdiv(call.n, self.block_n)

    def sums(self, call: Call) -> int:
        # A masked group has products at hand beside its sum; from compilation, two for four.
        outs = 1 + call.masked * call.projections // 2
        if not call.alone and not self.uses_descriptors(call):
            # Addresses take registers, too: of ragged rows as many as there are elements.
            ragged = call.pointers or call.n % 16 > 0
            outs = outs + 2 if ragged else max(outs, 2)
        return self.block_m * (outs * self.block_n + call.project * self.block_r(call))

    def shared_memory(self, target: Target, call: Call) -> int:
        r, n, size = self.block_r(call), call.projections, call.itemsize
        copies = target.copies(self.stages)
        low_rank = (self.block_m + self.block_n) * r * size
        if call.r <= r and (target.descriptors or call.r * n <= 16):
            low_rank *= n
        if call.masked and size == 4:
            low_rank *= 2  # as loaded, and as tensor cores read it
        store = self.block_m * self.block_n * size
        if call.alone:  # the only loop is the one over tiles
            low_rank = n * (self.block_m * size + self.block_n * 4) * r
            return copies * low_rank + store + MARGIN
        step = (self.block_m + self.block_n) * self.block_k * size
        step += call.project * self.block_k * r * 4
        if call.packed:  # codes wait, and the numbers that they become are handed round
            low_rank += self.block_n * self.block_k * (size + 4)
        if self.uses_descriptors(call) and not call.segments:
            # Half of the tile is stored from beside the main loop's buffers.
            return copies * step + low_rank + store // 2 + MARGIN
        return max(copies * step + low_rank, store) + MARGIN

    def tensor_memory(self, target: Target, call: Call) -> int:
        """The columns of an accumulator for every product, twice: before and after a step."""
        if not target.tensor_memory:
            return 0
        columns = self.block_n * power_of_two(2 * call.projections)
        return columns + call.project * self.block_r(call)

    def neighbours(self) -> Iterator[Config]:
        for config in super().neighbours():
            yield config
            yield replace(config, group=4)
            yield replace(config, group=16)
            yield replace(config, descriptors=False)
