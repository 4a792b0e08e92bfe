"""How deep in loops each instruction of a kernel's machine code lies."""

import re
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


def depths(code: list[Instruction]) -> dict[int, int]:
    """How many loops there are around each address."""
    graph = networkx.DiGraph()
    for each, after in pairwise([*code, code[-1]]):
        graph.add_node(each.address)
        if each.target is not None:
            graph.add_edge(each.address, each.target)
        if after is not each and (each.conditional or each.name not in ("BRA", "EXIT")):
            graph.add_edge(each.address, after.address)
    depth = dict.fromkeys(graph, 0)
    _add_loops(graph, depth)
    return depth


def _add_loops(graph: networkx.DiGraph, depth: dict[int, int]) -> None:
    """Count each loop for what it holds; then those inside it: loops without the way back to it."""
    for loop in networkx.strongly_connected_components(graph):
        inside = graph.subgraph(loop).copy()
        if inside.size() == 0:
            continue
        for address in loop:
            depth[address] += 1
        entries = {after for before, after in graph.in_edges(loop) if before not in loop}
        inside.remove_edges_from([*inside.in_edges(entries or {min(loop)})])
        _add_loops(inside, depth)
