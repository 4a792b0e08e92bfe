"""A launch as a record: what runs, on which grid, and what work it states about itself."""

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
    """What one launch does.  Bytes count once for each launch, or as often as a tile asks.

    With segments, it is as if each had rows and no rows were nobody's; by tiles it is a bound.
    """

    flops: int
    loaded: int  # bytes, each element once
    stored: int  # bytes; no kernel stores an element twice
    loaded_by_tiles: int  # bytes, again for every tile that needs them
    partial: int = 0  # bytes of partial sums, which are part of loaded and stored


def size_of(*operands: Tensor | TensorDescriptor | None) -> int:
    """Bytes of the elements; None has none."""
    tensors = [o.base if isinstance(o, TensorDescriptor) else o for o in operands if o is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stated(work: Callable[[Mapping[str, Any]], Work]) -> Callable:
    """Triton's ``launch_metadata`` of a kernel: what profilers such as Proton show of a launch.

    ``work`` makes it of the kernel's arguments, by name.
    """

    def metadata(grid: tuple[int, ...], kernel: Any, arguments: Mapping[str, Any]) -> dict:
        cost = work(arguments)
        return {"flops": cost.flops, "bytes": cost.loaded + cost.stored}

    return metadata


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    work_of: Callable[[Mapping[str, Any]], Work]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    def work(self) -> Work:
        return self.work_of(self.arguments)

    @property
    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if not INTERPRETED.value:  # which has no such option
            # The mask's hash wraps, where TRITON_DEBUG=1 would trap.
            options["sanitize_overflow"] = False
            # Products are added in one step.  Triton 3.9 warns that 3.10 won't by itself.
            options["enable_fp_fusion"] = True
        return options

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def identity(self) -> str:
        """Its name, and a hash of what it would be compiled for, where it is interpreted."""
        names = [name for name in self.arguments if len(name) > 1 and name.isupper()]
        settings = [self.options, *[(name, self.arguments[name]) for name in names]]
        return f"{self.name} {sha256(repr(settings).encode()).hexdigest()}"

    def compile(self) -> Any:
        """Triton's compiled kernel, as :meth:`run` would launch it; the arguments may be meta."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self.options)


# Not a context variable: a backward runs in a thread of autograd's own.
interceptor: Callable[[Launch], None] | None = None
_here = threading.local()  # a recording is one thread's


def launch(record: Launch) -> None:
    """Run it, unless :func:`recording` or :func:`intercept` wants it."""
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
    """Hand every launch inside the block to ``handler``, which runs it or doesn't.

    On meta tensors, a handler that runs nothing learns what a call would launch.
    """
    global interceptor
    before, interceptor = interceptor, handler
    try:
        yield
    finally:
        interceptor = before
