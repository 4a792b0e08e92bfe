"""Compile a kernel with Triton for an absent GPU, and run its PTX on CPU tensors."""

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.tools.tensor_descriptor import TensorDescriptor

from .memory import RACES, Fault, Finding, Kernel, Memory, Unsupported

__all__ = ["RACES", "Fault", "Finding", "Ran", "Unsupported", "run", "use"]

_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B",
            "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}  # fmt: skip
_stages = CUDABackend.add_stages
_kernels: dict[tuple[str, int], Kernel] = {}


def _without_ptxas(self, stages, *options):
    _stages(self, stages, *options)
    stages["cubin"] = lambda ptx, metadata: ptx.encode()  # driver.py loads it


CUDABackend.add_stages = _without_ptxas


@dataclass(frozen=True)
class Ran:
    """A launch, and its findings."""

    name: str
    grid: tuple[int, ...]
    warps: int
    shared: int  # bytes
    steps: int  # executed instructions, counted by warp
    seconds: float
    findings: list[Finding]
    kernel: Any  # Triton's compiled kernel


def use(arch: int) -> None:
    """Make Triton compile for sm_<arch> until the process ends."""
    target = GPUTarget("cuda", arch, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: arch,  # a kernel's cache of compiled code has only this key
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)


def run(
    jitted,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    options: dict[str, Any],
    change: Callable[[str], str] | None = None,
    check: bool = True,
    only: Sequence[int] = (),
    order: int = 0,
) -> Ran:
    """Compile a kernel, and run it in the emulator.

    ``change`` edits the PTX first.  :meth:`Kernel.launch` describes the other arguments.
    """
    kernel = jitted.warmup(**arguments, grid=grid, **options)
    text, metadata = kernel.asm["ptx"], kernel.metadata
    if change is not None:
        text = change(text)
    key = text, metadata.shared
    if key not in _kernels:
        _kernels[key] = Kernel(text, metadata.shared, metadata.num_warps * 32)
    machine = _kernels[key]
    memory = Memory(_tensors(list(arguments.values())))
    parameters = _parameters(kernel, arguments, machine.program)
    start = time.perf_counter()
    result = machine.launch(grid, parameters, memory, check=check, only=only, order=order)
    took = time.perf_counter() - start
    name, warps = jitted.__name__, metadata.num_warps
    return Ran(name, grid, warps, metadata.shared, result.steps, took, result.findings, kernel)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, TensorDescriptor):
        yield value.base
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _parameters(kernel, arguments: dict[str, Any], program) -> bytes:
    """The block of parameters for these named arguments."""
    maps = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    parts = [
        part
        for name, kind in kernel.src.signature.items()
        for part in _parts(kind, arguments.get(name), maps)
    ]
    return block_of(parts, program)


def block_of(parts: Sequence[bytes | int], program) -> bytes:
    """The block of parameters; parameters that Triton adds at the end (scratch) are null."""
    parts = [*parts, *[0] * (len(program.parameters) - len(parts))]
    block = bytearray(program.parameter_bytes)
    for parameter, part in zip(program.parameters, parts, strict=True):
        if isinstance(part, int):  # a number as wide as its parameter
            part = (part % 2 ** (8 * parameter.size)).to_bytes(parameter.size, "little")
        assert parameter.size == len(part), (parameter, part)
        block[parameter.offset : parameter.offset + parameter.size] = part
    return bytes(block)


def _parts(kind: str | tuple, value: Any, maps: Iterator[dict]) -> Iterator[bytes | int]:
    """The parameters for an argument."""
    if isinstance(kind, tuple):
        for each_kind, each in zip(kind, value, strict=True):
            yield from _parts(each_kind, each, maps)
    elif kind.startswith("tensordesc"):
        sizes = [*value.shape, *value.strides]
        found = next(maps, None)
        if found is not None:
            yield _tensor_map(value, found)
        else:  # before Hopper, Triton splits descriptors into numbers
            yield from [value.base.data_ptr(), *sizes, int(value.padding == "nan")]
            if hasattr(value, "round_f32_to_tf32"):
                yield int(value.round_f32_to_tf32)
        yield from sizes
    elif kind.startswith("*"):
        yield 0 if value is None else value.data_ptr()
    elif kind != "constexpr":
        yield struct.pack("<" + _FORMATS[kind], value)


def _tensor_map(descriptor: TensorDescriptor, meta: dict) -> bytes:
    """The bytes of machine.h's TensorMap."""
    base, rank = descriptor.base, len(descriptor.shape)
    size = base.element_size()
    swizzle = (0, 32, 64, 128)[int(meta["swizzle"])]
    shape = [*reversed(descriptor.shape), 1, 1, 1, 1][:5]
    strides = [*(each * size for each in reversed(descriptor.strides[:-1])), 0, 0, 0, 0][:4]
    box = [*reversed(meta["block_size"]), 1, 1, 1, 1][:5]
    if base.data_ptr() % 16 or any(each % 16 for each in strides) or max(box) > 256:
        raise ValueError(f"CUDA has no tensor map of {descriptor}, with a box of {box}")
    numbers = (0x70A5C0DE, base.data_ptr(), rank, size, swizzle, 0, *shape, *strides, *box)
    return struct.pack("<QQ4B5I4Q5H", *numbers).ljust(128, b"\0")
