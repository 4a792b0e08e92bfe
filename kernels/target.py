"""Targets: the properties of an architecture or device that configs are chosen and checked by."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

from .common import INTERPRETED


@dataclass(frozen=True)
class Target:
    """An architecture, or one device of it."""

    name: str  # the key of its tables in defaults.py
    kind: str  # "cuda", "hip", or "cpu" for Triton's interpreter
    arch: int | str  # the value of Triton's GPUTarget.arch
    warp_size: int
    shared_memory: int  # the most bytes that a program can have
    processors: int  # SMs or compute units
    descriptors: bool = False  # loads matrices by tensor descriptor (TMA)
    tensor_memory: int = 0  # columns of Blackwell's tensor memory, which holds accumulators
    l2: float = 2.5  # bandwidth of the L2 cache relative to DRAM: an assumption
    masking: int = 1  # programs that a processor should run if they compute a group's masks
    tf32: bool = True
    float32: bool = True  # has fast products in float32 of some precision
    device: str = ""  # the name of an actual device; "" for an architecture

    @property
    def float8(self) -> bool:
        """Whether an instruction converts float8 (e4m3)."""
        return isinstance(self.arch, int) and self.arch >= 89

    @property
    def int8(self) -> bool:
        """Whether matrix instructions multiply int8; B300's (sm_103) don't."""
        return self.arch != 103

    @property
    def turns_int8(self) -> bool:
        """Whether int8 operands should lie along the axis that the product sums over.

        ``mma.sync`` has no transposed load of bytes, so that Triton would load byte by byte.
        """
        return self.kind == "cuda" and self.arch not in (90, 100)

    def copies(self, stages: int) -> int:
        """The number of shared-memory buffers of a loop with ``stages`` pipeline stages.

        On Hopper and newer, tensor cores read operands from shared memory, so the current step's
        buffer stays occupied until the step is over.
        """
        return max(1, stages if self.descriptors else stages - 1)


_KIB = 1024
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * _KIB, 108, masking=2),
        Target("sm_86", "cuda", 86, 32, 99 * _KIB, 84, l2=4.0),
        Target("sm_90", "cuda", 90, 32, 227 * _KIB, 132, True, masking=2),
        Target("sm_100", "cuda", 100, 32, 227 * _KIB, 148, True, tensor_memory=512, masking=2),
        Target("sm_120", "cuda", 120, 32, 99 * _KIB, 170, l2=4.0),
        Target("gfx942", "hip", "gfx942", 64, 64 * _KIB, 304),
        Target("gfx950", "hip", "gfx950", 64, 64 * _KIB, 256, tf32=False),
        Target("gfx11", "hip", "gfx1100", 32, 64 * _KIB, 96, tf32=False, float32=False),
        # Few processors, and small tiles (defaults.py), so that small shapes reach every branch.
        Target("interpreter", "cpu", 0, 32, 2**40, 6, descriptors=True),
    )
}

# On these architectures, loops over K give wrong results or read out of bounds (triton#11378, seen
# on gfx1151), so no kernel runs there.
_MISCOMPILED = "gfx115"

# The target of CPU tensors.  Tests assign a GPU target here, with a driver that launches nothing.
_of_cpu: Target | None = TARGETS["interpreter"] if INTERPRETED.value else None
forced: Target | None = None  # not a context variable: a backward runs in another thread


@contextmanager
def use_target(target: Target) -> Iterator[None]:
    """Use this target for tensors on any device, to compile or count with meta tensors."""
    global forced
    before, forced = forced, target
    try:
        yield
    finally:
        forced = before


def target_of(device: torch.device) -> Target | None:
    """The target of a device, or None where these kernels can't run."""
    if forced is not None:
        return forced
    if device.type == "cpu":
        return _of_cpu
    if device.type != "cuda" or INTERPRETED.value:
        return None
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _device_target(index: int) -> Target | None:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        if not arch.startswith(("gfx9", "gfx11", "gfx12")) or arch.startswith(_MISCOMPILED):
            return None
        target = TARGETS.get(arch) or TARGETS["gfx942" if arch.startswith("gfx9") else "gfx11"]
        warp_size, shared_memory = properties.warp_size, target.shared_memory
    else:
        capability = 10 * properties.major + properties.minor
        rows = [t for t in TARGETS.values() if t.kind == "cuda" and t.arch <= capability]
        if not rows:
            return None
        target, arch = max(rows, key=lambda row: row.arch), capability
        warp_size, shared_memory = 32, properties.shared_memory_per_block_optin
    return replace(
        target,
        arch=arch,
        warp_size=warp_size,
        # Among AMD's targets only gfx942 itself has TF32, not others that share its tables.
        tf32=target.tf32 and (target.kind != "hip" or arch == target.arch),
        shared_memory=shared_memory,
        device=properties.name,
        processors=properties.multi_processor_count,
    )
