"""Which instructions of a kernel's machine code lie in a loop, and in how many."""

import re
from collections.abc import Iterable
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


Edges = set[tuple[int, int]]


def depths(code: list[Instruction]) -> dict[int, int]:
    """How many loops there are around each address."""
    starts = {code[0].address} | {each.target for each in code if each.target is not None}
    starts |= {after.address for each, after in pairwise(code) if each.name in ("BRA", "EXIT")}
    block, block_of = code[0].address, {}
    for each in code:
        block = each.address if each.address in starts else block
        block_of[each.address] = block
    edges: Edges = {
        (block_of[each.address], each.target) for each in code if each.target is not None
    }
    for each, after in pairwise(code):
        falls_through = each.conditional or each.name not in ("BRA", "EXIT")
        if falls_through and after.address in starts:
            edges.add((block_of[each.address], after.address))
    deep = dict.fromkeys(starts, 0)
    _descend(edges, deep)
    return {address: deep[block] for address, block in block_of.items()}


def _descend(edges: Edges, deep: dict[int, int]) -> None:
    """Add 1 to ``deep`` for every block of a loop, and look for loops inside without its entry."""
    for loop in _loops(edges):
        for block in loop:
            deep[block] += 1
        entries = {after for before, after in edges if after in loop and before not in loop}
        inside = {(a, b) for a, b in edges if a in loop and b in loop and b not in entries}
        _descend(inside, deep)


def _loops(edges: Edges) -> list[frozenset[int]]:
    """The strongly connected parts: blocks that reach each other, and so themselves."""
    reached = {block: _reach(edges, block) for block, _ in edges}
    return list(
        {
            frozenset(other for other in there if block in reached.get(other, ()))
            for block, there in reached.items()
            if block in there
        }
    )


def _reach(edges: Edges, start: int) -> set[int]:
    following: dict[int, list[int]] = {}
    for before, after in edges:
        following.setdefault(before, []).append(after)
    reached: set[int] = set()
    waiting: Iterable[int] = [start]
    while waiting:
        new = {after for block in waiting for after in following.get(block, ())} - reached
        reached |= new
        waiting = new
    return reached
