"""Runs a :class:`~tools.machine.ptx.Program` on tensors of the CPU, and reports findings."""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import CACHE
from .ptx import Program, parse

HERE = Path(__file__).resolve().parent
# The names of machine.h's Kind.
KINDS = ["RAW", "WAR", "WAW", "in flight", "no proxy fence", "uninitialized", "stored twice",
         "global race", "early register", "early load"]  # fmt: skip
# Findings that may be intended are not races: a masked lane reads unwritten memory, and warps store
# equal bytes.  LLVM also moves arithmetic on the result of a tcgen05.ld before its wait.  PTX
# forbids this, but ptxas makes it correct with a scoreboard.
RACES = {*KINDS} - {"uninitialized", "stored twice", "early load"}
_FLAGS = (
    "-O3 -march=native -std=c++20 -shared -fPIC -fvisibility=hidden -fwrapv -fno-math-errno "
    "-fno-strict-aliasing -ffp-contract=off -w"
)


class Fault(RuntimeError):  # noqa: N818
    """An access or instruction at which a GPU traps, or may trap."""


class Unsupported(RuntimeError):  # noqa: N818
    """Instructions that the emulator doesn't know."""


@dataclass(frozen=True)
class Finding:
    kind: str
    line: str  # the instruction
    other: str  # the other instruction of the race
    address: int  # in shared memory, in a tensor's storage, or a column of tensor memory
    cta: int
    warp: int
    count: int

    def __str__(self) -> str:
        behind = f" after `{self.other}`" if self.other else ""
        where = f"CTA {self.cta}, warp {self.warp}, at {self.address}"
        return f"{self.kind} x{self.count}: `{self.line}`{behind} ({where})"


@dataclass(frozen=True)
class Result:
    steps: int  # executed instructions, counted by warp
    findings: list[Finding]


class _Launch(ctypes.Structure):
    """The fields of machine.h's Launch."""

    _fields_ = [
        ("grid", ctypes.c_int64 * 3),
        *[(n, ctypes.c_int64) for n in ("threads", "shared", "granule", "check", "limit")],
        *[(n, ctypes.c_void_p) for n in ("parameters", "ctas", "warp_order")],
        *[(n, ctypes.c_int64) for n in ("parameter_bytes", "cta_count", "storage_count")],
        *[(n, ctypes.c_void_p) for n in ("starts", "ends", "allowed", "writers", "readers")],
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator's library, built if there is no build of this source for this CPU."""
    sources = [*sorted(HERE.glob("*.h")), HERE / "machine.cpp"]
    known = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    compiler = next((each for each in known if each and shutil.which(each)), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++ or clang++, or name yours in CXX")
    key = hashlib.sha256(f"{compiler} {_FLAGS} {_cpu()}".encode())
    for source in sources:
        key.update(source.read_bytes())
    path = CACHE / f"machine-{key.hexdigest()[:16]}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *_FLAGS.split(), "-o", part, HERE / "machine.cpp"], check=True)
        part.replace(path)
    found = ctypes.CDLL(str(path))
    found.new_machine.restype = ctypes.c_void_p
    found.run.restype = ctypes.c_char_p
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    flags = (
        re.search(r"^(flags|Features).*$", info.read_text(), re.MULTILINE) if info.exists() else ""
    )
    return platform.machine() + (flags[0] if flags else "")


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Memory:
    """The tensors that a launch may access: only their elements, not the gaps between them."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self.allowed: dict[int, np.ndarray] = {}  # a storage's address → a flag for each byte
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.numel() == 0:
                continue
            start = storage.data_ptr()
            flags = self.allowed.setdefault(start, np.zeros(storage.nbytes(), np.uint8))
            size, offset = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
            strides = [stride * size for stride in tensor.stride()]
            for byte in range(size):
                view = torch.from_numpy(flags).as_strided(tensor.shape, strides, offset + byte)
                view.fill_(1)

    def tables(self) -> list[np.ndarray]:
        """Starts, ends, and pointers to the flags, to writers and to readers, sorted by address."""
        starts = sorted(self.allowed)
        flags = [self.allowed[start] for start in starts]
        self.owners = [np.zeros((2, len(each)), np.uint64) for each in flags]
        columns = [
            starts,
            [start + len(each) for start, each in zip(starts, flags, strict=True)],
            [each.ctypes.data for each in flags],
            [each[0].ctypes.data for each in self.owners],
            [each[1].ctypes.data for each in self.owners],
        ]
        return [np.array(column, np.uint64) for column in columns]


class Kernel:
    """A decoded program; :meth:`launch` runs it.  Raises Unsupported for unknown instructions."""

    def __init__(self, source: str, shared: int, threads: int = 0):
        self.program = program = parse(source)
        self.shared, self.threads = shared, threads or program.threads
        unknown = dict(program.unknown)
        for name, line in zip(program.operations, program.text, strict=True):
            if not library().knows(name.encode()):
                unknown.setdefault(name, line)
        if unknown:
            raise Unsupported("; ".join(sorted(unknown.values())))
        names = [name.encode() for name in program.operations]
        code = np.array(_encoded(program), np.uint64)
        count = len(names)
        self._machine = ctypes.c_void_p(
            library().new_machine(
                (ctypes.c_char_p * count)(*names), ctypes.c_int64(count),
                ctypes.c_int64(program.slots), _pointer(code),
            )
        )  # fmt: skip

    def __del__(self):
        if hasattr(self, "_machine"):
            library().free_machine(self._machine)

    def launch(
        self,
        grid: Sequence[int],
        parameters: bytes,
        memory: Memory,
        *,
        check: bool = True,
        only: Sequence[int] = (),
        order: int = 0,
        limit: int = 2 * 10**9,
    ) -> Result:
        """Run the CTAs of the grid, or ``only`` these.

        ``check``: find races.  ``order``: 0, or the seed of another order of CTAs and warps.
        ``limit``: the number of instructions.  Raises Fault for an access that a GPU can't do.
        """
        assert len(parameters) == self.program.parameter_bytes
        sizes = (*grid, 1, 1)[:3]
        ctas = np.array(list(only) or range(int(np.prod(sizes))), np.int64)
        warps = np.arange(-(-self.threads // 32), dtype=np.int64)
        if order:
            generator = np.random.default_rng(order)
            ctas, warps = generator.permutation(ctas), generator.permutation(warps)
        tables = memory.tables()
        block = ctypes.create_string_buffer(parameters, len(parameters) + 16)
        launch = _Launch(
            sizes, self.threads, self.shared, self.program.granule, check, limit,
            ctypes.addressof(block), _pointer(ctas), _pointer(warps),
            len(parameters), len(ctas), len(memory.allowed), *map(_pointer, tables),
        )  # fmt: skip
        error = library().run(self._machine, ctypes.byref(launch)).decode()
        where = (ctypes.c_int64 * 3)()
        library().where(self._machine, where)
        findings = self._findings()
        if error:
            _, cta, pc = where
            raise Fault(
                f"{error}: `{self._line(pc)}` (CTA {cta}, instruction {pc})"
                + "".join(f"; {each}" for each in findings[:3])
            )
        return Result(where[0], findings)

    def _line(self, pc: int) -> str:
        return self.program.text[pc] if 0 <= pc < len(self.program.text) else ""

    def _findings(self) -> list[Finding]:
        rows = np.zeros((4096, 7), np.int64)
        count = library().findings(self._machine, _pointer(rows), len(rows))
        found = []
        for kind, pc, other, address, cta, warp, times in rows[:count].tolist():
            lines = self._line(pc), self._line(other)
            found.append(Finding(KINDS[kind], *lines, address, cta, warp, times))
        return found


def _encoded(program: Program) -> list[int]:
    """The input of machine.cpp's new_machine: lists, each after its length."""
    lists: list[Sequence[int]] = []
    for each in zip(program.guards, program.operands, program.registers, strict=True):
        lists += each
    constants = [(slot, *key) for key, slot in program.constants.items()]
    lists += [[n for each in constants for n in each]]
    lists += [[n for each in program.specials.items() for n in each]]
    return [n & (2**64 - 1) for each in lists for n in (len(each), *each)]
