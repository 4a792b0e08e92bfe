"""A kernel launch as a record: kernel, grid, arguments, and the work that it states."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import INTERPRETED


@dataclass(frozen=True)
class Work:
    """The FLOPs and bytes of one launch, computed from shapes, for benchmarks and profilers.

    With segments, the counts assume that every row has a segment and no segment is empty, and
    ``loaded_by_tiles`` is an upper bound.
    """

    flops: int
    loaded: int  # bytes, each element counted once: the traffic from DRAM if caches are perfect
    stored: int  # bytes; no kernel stores an element twice
    loaded_by_tiles: int  # bytes, an element counted for every tile that loads it: L2 requests
    partial: int = 0  # bytes of partial sums, already counted in ``loaded`` or ``stored``


def size_of(*operands: Tensor | TensorDescriptor | None) -> int:
    """Bytes of the operands' elements; None counts as zero."""
    tensors = [o.base if isinstance(o, TensorDescriptor) else o for o in operands if o is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stated(work: Callable[[Mapping[str, Any]], Work]) -> Callable:
    """The ``launch_metadata`` for ``triton.jit``: profilers such as Proton show it for each launch.

    ``work`` computes the FLOPs and bytes from a dict of the kernel's arguments.
    """

    def metadata(grid: tuple[int, ...], kernel: Any, arguments: Mapping[str, Any]) -> dict:
        cost = work(arguments)
        return {"flops": cost.flops, "bytes": cost.loaded + cost.stored}

    return metadata


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.  Launchers build it and hand it to :func:`launch`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    work_of: Callable[[Mapping[str, Any]], Work]

    def __post_init__(self) -> None:
        assert self.grid[0] < 2**31  # a program's number has 32 bits

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    def work(self) -> Work:
        return self.work_of(self.arguments)

    @property
    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if not INTERPRETED.value:  # the interpreter rejects these options
            # The dropout mask's hash relies on wrapping; TRITON_DEBUG=1 would trap there.
            options["sanitize_overflow"] = False
            # Fuse multiply and add.  Triton 3.9 warns that 3.10 turns this off by default.
            options["enable_fp_fusion"] = True
        return options

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def identity(self) -> str:
        """The kernel's name, and a hash of all compile-time arguments and options.

        It stands for the hash of compiled code, which the interpreter doesn't have.
        """
        # Compile-time arguments have names in capitals, of several letters; M and N are sizes.
        names = [name for name in self.arguments if len(name) > 1 and name.isupper()]
        settings = [self.options, *[(name, self.arguments[name]) for name in names]]
        return f"{self.name} {sha256(repr(settings).encode()).hexdigest()}"

    def compile(self) -> Any:
        """The compiled kernel that :meth:`run` would launch; arguments may be meta tensors."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self.options)


# Not a context variable, because autograd runs a backward in a thread of its own.
interceptor: Callable[[Launch], None] | None = None
_here = threading.local()  # a recording concerns only the thread that records


def launch(record: Launch) -> None:
    """Run the launch, or hand it to the handler of :func:`recording` or :func:`intercept`."""
    handler = getattr(_here, "handler", None) or interceptor
    if handler is None:
        record.run()
    else:
        handler(record)


@contextmanager
def recording(handler: Callable[[Launch], None]) -> Iterator[None]:
    """Hand this thread's launches inside the block to ``handler``."""
    _here.handler = handler
    try:
        yield
    finally:
        _here.handler = None


@contextmanager
def intercept(handler: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch inside the block, in all threads, to ``handler``, which may run it.

    With meta tensors, a handler that runs nothing lists the launches of a call.
    """
    global interceptor
    before, interceptor = interceptor, handler
    try:
        yield
    finally:
        interceptor = before
