"""What Triton makes of a launch, with no GPU: compile it for a target and read the machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from fastlora.kernels.launch import Launch
from fastlora.kernels.target import Target

from .loops import Instruction, depths

# HMMA, HGMMA (wgmma), UTCHMMA (tcgen05) and their kin; matrix instructions of CDNA and RDNA.
_TENSOR_CORE = re.compile(r"(UT)?[A-Z]?(HMMA|QMMA|GMMA)|v_(mfma|wmma)\w*")
_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code.  Counts of instructions are of the text, not of a run."""

    registers: int  # of a thread; on AMD vector registers and accumulators
    stack: int  # bytes of a thread
    spills: int  # instructions that touch the stack; on AMD registers that are kept there
    inner_spills: int  # those of a loop over steps; on AMD every instruction that touches scratch
    shared_memory: int  # bytes of a program
    tensor_memory: int  # columns
    tensor_core: int  # instructions
    tma_loads: int
    tma_stores: int
    stores: int  # to global memory: none, where the compiler gave the kernel up
    widest_load: int  # bits that a thread loads at once
    instructions: int


class Driver:
    """All that ``kernel.warmup`` asks of a GPU's driver."""

    def __init__(self, target: Target):
        self._name = target.name
        self._target = GPUTarget(target.kind, target.arch, target.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        """A kernel keeps what it compiled by this, and looks at no target again."""
        return self._name

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile it as ``launch.run()`` would on that target, its arguments being meta tensors."""
    triton.runtime.driver.set_active(Driver(target))
    kernel = launch.compile()
    if target.kind == "hip":
        return _read_amd(kernel)
    # Around the loops over steps, a persistent program has one over tiles.
    return _read_nvidia(kernel, tile_loops=int(launch.arguments.get("PERSISTENT", False)))


def _read_nvidia(kernel, tile_loops: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    code = [
        Instruction(int(address, 16), predicate != "", opcode, operands)
        for address, predicate, opcode, operands in _SASS.findall(text)
    ]
    names = Counter(instruction.name for instruction in code)
    spills = [instruction for instruction in code if instruction.name in ("LDL", "STL")]
    depth = depths(code)
    return Compiled(
        registers=registers,
        stack=stack,
        spills=len(spills),
        inner_spills=sum(depth[spill.address] > tile_loops for spill in spills),
        shared_memory=kernel.metadata.shared,
        tensor_memory=kernel.metadata.tmem_size,
        tensor_core=_count(names, _TENSOR_CORE),
        tma_loads=names["UTMALDG"],
        tma_stores=names["UTMASTG"],
        stores=names["STG"] + names["UTMASTG"],
        widest_load=max(map(_load_bits, code)),
        instructions=len(code),
    )


def _load_bits(instruction: Instruction) -> int:
    """``LDG.E.128`` loads 128 bits, ``LDGSTS.E.BYPASS.128`` too, ``LDG.E`` 32."""
    if instruction.name not in ("LDG", "LDGSTS"):
        return 0
    parts = set(instruction.opcode.split("."))
    widths = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((bits for part, bits in widths.items() if part in parts), 32)


def _read_amd(kernel) -> Compiled:
    text = kernel.asm["amdgcn"]
    names = Counter(re.findall(r"^\t([a-z]\w+)", text.split("\n.Lfunc_end")[0], re.MULTILINE))

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    loads = re.compile(r"(?:global|buffer)_load_\w*?(?:dword|b)(?:x?(\d+))?")
    widths = {"": 32, "2": 64, "3": 96, "4": 128}
    found = [match[1] or "" for match in map(loads.match, names) if match]
    return Compiled(
        registers=metadata("vgpr_count"),
        stack=metadata("private_segment_fixed_size"),
        spills=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        inner_spills=_count(names, re.compile(r"scratch_\w+")),
        shared_memory=kernel.metadata.shared,
        tensor_memory=0,
        tensor_core=_count(names, _TENSOR_CORE),
        tma_loads=0,
        tma_stores=0,
        stores=_count(names, re.compile(r"(global|buffer)_store\w+")),
        widest_load=max((widths.get(width) or int(width) for width in found), default=0),
        instructions=sum(count for name, count in names.items()),
    )


def _count(names: Counter, pattern: re.Pattern) -> int:
    return sum(count for name, count in names.items() if pattern.fullmatch(name))
