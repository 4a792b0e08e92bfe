"""How deep in loops each instruction of a kernel's machine code lies."""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Instruction:
    """One line of SASS, without its encoding."""

    address: int
    conditional: bool
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.name != "BRA":
            return None
        return int(re.findall(r"0x([0-9a-f]+)", self.operands)[-1], 16)


Graph = dict[int, set[int]]  # the blocks that follow a block, each named by its first address


def depths(code: list[Instruction]) -> dict[int, int]:
    """How many loops there are around each address."""
    starts = {code[0].address} | {each.target for each in code if each.target is not None}
    starts |= {after.address for each, after in pairwise(code) if each.name in ("BRA", "EXIT")}
    block, block_of, following = code[0].address, {}, defaultdict(set)
    for each, after in pairwise([*code, code[-1]]):
        block = each.address if each.address in starts else block
        block_of[each.address] = block
        if each.target is not None:
            following[block].add(each.target)
        if after.address in starts and (each.conditional or each.name not in ("BRA", "EXIT")):
            following[block].add(after.address)
    depth = dict.fromkeys(starts, 0)
    _add_loops(following, depth)
    return {address: depth[block] for address, block in block_of.items()}


def _add_loops(following: Graph, depth: dict[int, int]) -> None:
    """Count each loop for its blocks; then those inside it, which are loops without its entry."""
    for loop in _loops(following):
        for block in loop:
            depth[block] += 1
        entries = {
            after
            for block, others in following.items()
            if block not in loop
            for after in others & loop
        } or {min(loop)}
        _add_loops({block: (following[block] & loop) - entries for block in loop}, depth)


def _loops(following: Graph) -> set[frozenset[int]]:
    """Blocks that reach each other, and so themselves."""
    reached = {block: _reach(following, block) for block in following}
    return {
        frozenset(other for other in there if block in reached.get(other, ()))
        for block, there in reached.items()
        if block in there
    }


def _reach(following: Graph, start: int) -> set[int]:
    reached: set[int] = set()
    waiting = {start}
    while waiting:
        waiting = {after for block in waiting for after in following.get(block, ())} - reached
        reached |= waiting
    return reached
