"""How deep in loops each instruction of a kernel's machine code lies."""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import networkx  # torch needs it, too


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
    graph = networkx.DiGraph([(block, after) for block in following for after in following[block]])
    for loop in networkx.strongly_connected_components(graph):
        if len(loop) == 1 and not graph.has_edge(*loop, *loop):
            continue
        for block in loop:
            depth[block] += 1
        entries = {
            after
            for block, others in following.items()
            if block not in loop
            for after in others & loop
        } or {min(loop)}
        _add_loops({block: (following.get(block, set()) & loop) - entries for block in loop}, depth)
