"""Compile a launch for a target without a GPU, and inspect the machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import networkx  # torch also needs it
import triton
from triton.backends.compiler import GPUTarget

from fastlora.kernels.launch import Launch
from fastlora.kernels.target import Target

# HMMA, HGMMA (wgmma), UTCHMMA (tcgen05) and similar; matrix instructions of CDNA and RDNA.
_TENSOR_CORE = r"(UT)?[A-Z]?(HMMA|QMMA|GMMA)|v_(mfma|wmma)\w*"
# Registers that an instruction with such a word writes; the others write one.
_WRITTEN = {"WIDE": 2, "64": 2, "128": 4, "2": 2, "4": 4, "HMMA": 4}
_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);")


class Instruction(NamedTuple):
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
        """The address of a branch's target."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else ()
        return int(found[-1], 16) if found else None


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code.  Instructions are counted in the text, not in a run."""

    registers: int  # of a thread; on AMD vector registers and accumulators
    stack: int  # bytes of a thread
    spills: int  # instructions that access the stack; on AMD, registers on the stack
    inner_spills: int  # spills in a loop over steps; on AMD, every instruction on scratch
    shared_memory: int  # bytes of a program
    tensor_memory: int  # columns
    tensor_core: int  # instructions
    tma_loads: int
    tma_stores: int
    stores: int  # to global memory; 0 if the compiler gave up the kernel
    instructions: int
    chained: int = 0  # products that add to a product of the same iteration
    overwritten: int = 0  # writes to registers that a running wgmma reads (triton#9433)
    packed_adds: int = 0  # add.s16x2; ptxas 12.9 drops one of its numbers (triton#11581)
    two_clusters: int = 0  # AMD's products whose schedule races (triton#11696)


def compile_launch(launch: Launch, target: Target, by_ptx: bool = False) -> Compiled:
    """Compile as ``launch.run()`` does on that target; its arguments are meta tensors.

    ``by_ptx``: for NVIDIA code without stack, wgmma, tensor memory and TMA, count in the PTX,
    because disassembling takes as long as compiling.
    """
    compiled_for = GPUTarget(target.kind, target.arch, target.warp_size)
    driver = SimpleNamespace(  # everything that ``kernel.warmup`` needs of a GPU's driver
        get_current_target=lambda: compiled_for,
        # a kernel's cache of compiled code has only this key
        get_current_device=lambda: target.arch,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    kernel = launch.compile()
    ttir, is_amd = kernel.asm["ttir"], target.kind == "hip"
    # A persistent program has a loop over tiles around the loops over steps.
    tile_loops = int(launch.arguments.get("PERSISTENT", False))
    return replace(
        _read_amd(kernel) if is_amd else _read_nvidia(kernel, tile_loops, by_ptx),
        chained=chained_products(ttir),
        two_clusters=products_in_two_clusters(ttir) * (is_amd and launch.warps == 8),
    )


def chained_products(ttir: str) -> int:
    """The number of products in a loop's accumulator that add to one of the same iteration."""
    scopes: list[tuple[set[str], set[str]]] = []  # a loop's carried values; products added to them
    found = 0
    for line in ttir.splitlines():
        if line.lstrip().startswith("}"):
            scopes.pop()
        product = re.match(r"\s*(%\S+) = tt\.dot %\S+, %\S+, (%[^\s,]+)", line)
        if product and scopes:
            carried, sums = scopes[-1]
            found += product[2] in sums
            if product[2] in carried | sums:
                sums.add(product[1])
        if line.endswith("{"):
            scopes.append((set(re.findall(r"(%\S+) = ", line.partition("iter_args")[2])), set()))
    return found


def products_in_two_clusters(ttir: str) -> int:
    """The number of products with the M, N, K and bits of triton#11696, which race with 8 warps."""
    tile = r"tt\.dot .*: tensor<(\d+)x(\d+)x[a-z]+(\d+)\S* \* tensor<\d+x(\d+)x"
    return sum(prod(map(int, sizes)) == 2**25 for sizes in re.findall(tile, ttir))


def overwrites(code: list[Instruction]) -> int:
    """Writes to registers that a running wgmma reads, also in the next iteration of a loop."""
    index = {each.address: i for i, each in enumerate(code)}
    back = [(index[each.target], i) for i, each in enumerate(code) if each.target in index]
    return sum(map(_overwrites_of, [code, *(code[to : i + 1] * 2 for to, i in back if to <= i)]))


def _overwrites_of(code: list[Instruction]) -> int:
    found, reading = 0, [set()]  # registers, by groups of wgmma; the last is not committed
    for each in code:
        written = re.match(r" *(?:!?U?PT?\d*, )?R(\d+)(?:, R(\d+))?", each.operands)
        if "GMMA" in each.name:
            reading[-1] |= {int(written[2]) + i for i in range(4) if written[2]}
            reading += [set()] * ("gsb0" in each.operands)
        elif "DEPBAR" in each.opcode and "gsb0" in each.operands:
            reading = reading[-1 - int(each.operands.split()[-1], 16) :]
        elif written:
            count = max(_WRITTEN.get(word, 1) for word in each.opcode.split("."))
            found += any(int(written[1]) + i in group for group in reading for i in range(count))
    return found


def _dumped(kernel, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_nvidia(kernel, tile_loops: int, by_ptx: bool) -> Compiled:
    usage, ptx = _dumped(kernel, "-res-usage"), kernel.asm["ptx"]
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    if by_ptx and not stack and not re.search(r"wgmma|tcgen05|cp\.async\.bulk", ptx):
        return Compiled(
            registers, stack, spills=0, inner_spills=0, shared_memory=kernel.metadata.shared,
            tensor_memory=0, tensor_core=ptx.count("mma.sync"), tma_loads=0, tma_stores=0,
            stores=ptx.count("st.global"), instructions=ptx.count(";"),
            packed_adds=ptx.count("add.s16x2"),
        )  # fmt: skip
    found = _SASS.findall(_dumped(kernel, "-sass"))
    code = [Instruction(int(address, 16), bool(guard), *rest) for address, guard, *rest in found]
    names = Counter(each.name for each in code)
    spilling = [each.address for each in code if each.name in ("LDL", "STL")]
    depth = depths(code) if spilling else {}  # only with spills, because this takes time
    spills = [depth[address] for address in spilling]
    return Compiled(
        registers=registers, stack=stack, spills=len(spills),
        inner_spills=sum(loops > tile_loops for loops in spills),
        shared_memory=kernel.metadata.shared, tensor_memory=kernel.metadata.tmem_size,
        tensor_core=_count(names, _TENSOR_CORE), tma_loads=names["UTMALDG"],
        tma_stores=names["UTMASTG"], stores=names["STG"] + names["UTMASTG"],
        instructions=len(code), packed_adds=ptx.count("add.s16x2"),
        overwritten=overwrites(code) if _count(names, r".*GMMA") else 0,
    )  # fmt: skip


def _read_amd(kernel) -> Compiled:
    text = kernel.asm["amdgcn"]
    names = Counter(re.findall(r"^\t([a-z]\w+)", text.split("\n.Lfunc_end")[0], re.MULTILINE))

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return Compiled(
        registers=metadata("vgpr_count"), stack=metadata("private_segment_fixed_size"),
        spills=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        inner_spills=_count(names, r"scratch_\w+"), shared_memory=kernel.metadata.shared,
        tensor_memory=0, tensor_core=_count(names, _TENSOR_CORE), tma_loads=0, tma_stores=0,
        stores=_count(names, r"(global|buffer)_store\w+"), instructions=names.total(),
    )  # fmt: skip


def _count(names: Counter, pattern: str) -> int:
    return sum(count for name, count in names.items() if re.fullmatch(pattern, name))


def depths(code: list[Instruction]) -> dict[int, int]:
    """The number of loops around each address."""
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
    """Add 1 to the depth of each loop's nodes, then the same for its inner loops."""
    for loop in networkx.strongly_connected_components(graph):
        inside = graph.subgraph(loop).copy()
        if inside.size() == 0:
            continue
        for address in loop:
            depth[address] += 1
        entries = {after for before, after in graph.in_edges(loop) if before not in loop}
        inside.remove_edges_from([*inside.in_edges(entries or {min(loop)})])
        _add_loops(inside, depth)
