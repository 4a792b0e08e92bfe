"""The emulator as Triton's driver: launches on CPU tensors run in it.

Everything above the driver is real: Triton's binder, its launcher, tensor maps, and the package's
captured calls, whose replays pass addresses.  A replay may access the tensors that it holds at that
moment, an ordinary launch the tensors among its arguments.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.nvidia import driver as of_triton

from fastlora.kernels import replay, target
from fastlora.kernels.launch import Launch
from fastlora.kernels.target import TARGETS, Target

from . import compiled
from .memory import RACES, Kernel, Memory

CAPTURED = "<a captured call>"  # the file name of replays in kernels/capture.py


_ROWS = [row for row in TARGETS.values() if row.kind == "cuda"]


def _like_its_row(arch: int, processors: int) -> Target:
    """The row for an architecture without its own row: the row before, as in `target_of`."""
    row = max((row for row in _ROWS if row.arch < arch), key=lambda row: row.arch)
    return replace(row, arch=arch, processors=processors)


_OTHERS = {89: 128, 103: 148, 121: 48}  # an RTX 4090, a B300 and a GB10
CARDS = {f"sm_{row.arch}": row for row in (*_ROWS, *map(_like_its_row, _OTHERS, _OTHERS.values()))}
CARDS = dict(sorted(CARDS.items(), key=lambda each: each[1].arch))


@dataclass
class Session:
    """The launches of a block of code, and their settings.

    ``order``: 0, or a seed that shuffles CTAs and warps.  ``allowed``: kinds of races that are not
    reported.
    """

    order: int = 0
    allowed: str = ""
    ran: list[compiled.Ran] = field(default_factory=list)

    @property
    def races(self) -> list[str]:
        told = RACES - {*self.allowed.split(",")}
        return [f"{r.name}: {f}" for r in self.ran for f in r.findings if f.kind in told]


_session = Session()


@contextmanager
def use(session: Session) -> Iterator[Session]:
    """A context whose launches belong to this session."""
    global _session
    before, _session = _session, session
    try:
        yield session
    finally:
        _session = before


def install(name: str, processors: int | None = None) -> None:
    """Run launches on CPU tensors as on this card, with this number of processors."""
    card = CARDS[name]
    target._of_cpu = card = replace(card, processors=processors or card.processors)
    compiled.use(card.arch)
    if not hasattr(of_triton, "PyKernelArg"):
        # Before 3.7, Triton makes a launcher in C for each kernel, so calls can't be replayed.
        Launch.run, replay.is_observed = _run, lambda: True
        return
    active = triton.runtime.driver.active
    active.launcher_cls = of_triton.CudaLauncher
    active.get_current_stream = lambda device: 0
    active.utils = SimpleNamespace(
        launch=_launch,
        load_binary=_load,
        unload_module=lambda module: None,
        build_signature_metadata=tuple,
        fill_tma_descriptor_tiled=_encode,
        get_device_properties=lambda device: {"max_shared_mem": card.shared_memory},
    )
    of_triton.PyKernelArg = SimpleNamespace
    of_triton.ARG_CONSTEXPR, of_triton.ARG_KERNEL, of_triton.ARG_TUPLE = range(3)


def _run(launch: Launch) -> None:
    operands = launch.kernel, launch.grid, launch.arguments, launch.options
    _session.ran.append(compiled.run(*operands, order=_session.order))


class _Loaded(NamedTuple):
    """A compiled kernel for Triton's launcher; its "binary" is PTX."""

    name: str
    text: bytes
    shared: int


class _Map(NamedTuple):
    address: int
    encoded: bytes


machines: dict[_Loaded, Kernel] = {}


def _load(name: str, text: bytes, shared: int, device: int) -> tuple:
    """(module, kernel, registers, spills, most threads)."""
    return None, _Loaded(name, text, shared), 0, 0, 1024


def _encode(address: int, swizzle: int, size: int, kind: int, box, shape, strides, padding) -> _Map:
    """A tensor map of elements with ``size`` bytes."""
    base = SimpleNamespace(data_ptr=lambda: address, element_size=lambda: size)
    described = SimpleNamespace(base=base, shape=shape, strides=strides)
    meta = {"swizzle": swizzle, "block_size": box}
    return _Map(address, compiled._tensor_map(described, meta))


def _launch(*handed: Any) -> None:
    """Run a launch.  Triton's launcher passes the grid, the kernel, and at the end its operands."""
    grid, loaded = handed[:3], handed[4]
    annotations, signature, operands = handed[-3:]
    machine = machines.get(loaded)
    if machine is None:
        machine = machines[loaded] = Kernel(loaded.text.decode(), loaded.shared)
    values = [*_flat(annotations, operands)]
    pairs = [*zip(signature, values, strict=True)]
    block = compiled.block_of([_part(kind, value) for kind, value in pairs], machine.program)
    touched = {_address(value) for kind, value in pairs if kind == "nvTmaDesc" or kind[0] == "*"}
    memory = Memory([each for each in _held(values) if _holds(each, touched)])
    start = time.perf_counter()
    result = machine.launch(grid, block, memory, order=_session.order)
    took, warps = time.perf_counter() - start, machine.threads // 32
    of_launch = loaded.name, grid, warps, loaded.shared, result.steps, took, result.findings
    _session.ran.append(compiled.Ran(*of_launch, machine))


def _flat(annotations: Sequence[Any], operands: Sequence[Any]) -> Iterator[Any]:
    for annotation, operand in zip(annotations, operands, strict=True):
        if annotation.type == of_triton.ARG_TUPLE:
            yield from _flat(annotation.nested_tuple, operand)
        elif annotation.type == of_triton.ARG_KERNEL:
            yield operand


def _part(kind: str, value: Any) -> bytes | int:
    if kind == "nvTmaDesc":
        return value.encoded
    if kind.startswith("*"):
        return _address(value)
    return next(compiled._parts(kind, value, iter(())))


def _address(value: Any) -> int:
    if isinstance(value, _Map):
        return value.address
    return value.data_ptr() if isinstance(value, Tensor) else value or 0


def _held(values: Sequence[Any]) -> list[Tensor]:
    """The tensors that a launch may access: the replay's, the launch's, or tensor operands."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == CAPTURED:
            values = [*frame.f_locals.values(), *vars(frame.f_locals["self"]).values()]
            values = [each for each in values if isinstance(each, Tensor)]
        if frame.f_code is replay.replay_call.__code__:
            values = [*values, *frame.f_locals["tensors"]]
            break
        if frame.f_code is Launch.run.__code__:
            values = [*frame.f_locals["self"].arguments.values()]
            break
        frame = frame.f_back
    return [*compiled._tensors(values)]


def _holds(tensor: Tensor, addresses: set[int]) -> bool:
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return any(start <= address < start + storage.nbytes() for address in addresses)
