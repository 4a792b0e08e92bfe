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

_TENSOR_CORES = re.compile(r"[A-Z]*(HMMA|GMMA|QMMA|CMMA)|v_(mfma|wmma)")
_TILE_LOOPS = {"gemm_lowrank": 1}  # loops around the ones that do the work: once a tile


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code.  Bytes are a thread's for the stack, else a program's."""

    registers: int  # of a thread; on AMD vector registers, accumulators among them
    stack: int
    spills: int  # instructions that touch the stack
    inner_spills: int  # those in a loop over steps: not in the loop over tiles
    shared_memory: int
    tensor_memory: int  # columns
    tensor_core: int  # instructions, by what they are named
    tma_loads: int
    tma_stores: int
    stores: int  # to global memory, TMA or not: a kernel that the compiler gave up has none
    instructions: int
    widest_load: int  # bits of the widest load from global memory, but for TMA


class Driver:
    """All that ``kernel.warmup`` asks of a GPU's driver."""

    def __init__(self, target: Target):
        self._target = GPUTarget(target.kind, target.arch, target.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile it as ``launch.run()`` would on that target, its arguments being meta tensors."""
    triton.runtime.driver.set_active(Driver(target))
    kernel = launch.kernel.warmup(
        **launch.arguments, grid=launch.grid, num_warps=launch.warps, num_stages=launch.stages
    )
    if target.kind == "hip":
        return _read_amd(kernel)
    return _read_nvidia(kernel, _TILE_LOOPS.get(launch.name, 0))


def _read_nvidia(kernel, tile_loops: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    code = [
        Instruction(int(address, 16), predicate != "", opcode, operands)
        for address, predicate, opcode, operands in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", text
        )
    ]
    names = Counter(instruction.name for instruction in code)
    spilling = [instruction for instruction in code if instruction.name in ("LDL", "STL")]
    depth = depths(code)
    return Compiled(
        registers=registers,
        stack=stack,
        spills=len(spilling),
        inner_spills=sum(depth[each.address] > tile_loops for each in spilling),
        shared_memory=kernel.metadata.shared,
        tensor_memory=kernel.metadata.tmem_size,
        tensor_core=sum(n for name, n in names.items() if _TENSOR_CORES.fullmatch(name)),
        tma_loads=names["UTMALDG"],
        tma_stores=names["UTMASTG"],
        stores=names["STG"] + names["UTMASTG"],
        instructions=len(code),
        widest_load=_widest(text, r"\bLDG(?:STS)?[\w.]*?\.(?:BYPASS\.)?(64|128)?\b"),
    )


def _read_amd(kernel) -> Compiled:
    text = kernel.asm["amdgcn"]
    code = text.split("s_endpgm")[0]
    names = Counter(re.findall(r"^\t([a-z]\w+)", code, re.M))

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    def count(pattern: str) -> int:
        return sum(n for name, n in names.items() if re.match(pattern, name))

    spills = metadata("vgpr_spill_count") + metadata("sgpr_spill_count")
    return Compiled(
        registers=metadata("vgpr_count"),
        stack=metadata("private_segment_fixed_size"),
        spills=spills,
        inner_spills=count("scratch_"),
        shared_memory=kernel.metadata.shared,
        tensor_memory=0,
        tensor_core=count("v_mfma|v_wmma"),
        tma_loads=0,
        tma_stores=0,
        stores=count("(global|buffer)_store"),
        instructions=sum(names.values()),
        widest_load=32,
    )
