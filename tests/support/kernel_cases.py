"""What the tests of the kernels share: operands of any layout, and records of launches.

And what a launch really loads and stores, counted byte by byte in Triton's interpreter.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from marks import DEVICE
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from fastlora.backends.dropout import dropout_mask
from fastlora.kernels.capture import CapturedCall
from fastlora.kernels.launch import Launch, Work, intercept
from fastlora.kernels.target import Target, target_of, use_target

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPE_IDS = {F16: "f16", BF16: "bf16", F32: "f32"}
dtypes = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16)],
    ids=DTYPE_IDS.get,
)
LAYOUTS = ["contiguous", "window", "column-major", "every-second-column", "every-second-row"]


def random(rows: int, columns: int, dtype: torch.dtype = F32, layout: str = "contiguous") -> Tensor:
    """A random matrix.  What lies between and around its elements in memory is NaN."""
    around = {
        "contiguous": lambda: torch.empty(rows, columns, dtype=dtype, device=DEVICE),
        # Rows of 16 bytes stay rows of 16 bytes: a descriptor can still describe it.
        "window": lambda: poisoned(rows + 2, columns + 16, dtype=dtype)[1:-1, 8:-8],
        "odd": lambda: poisoned(rows + 2, columns + 3, dtype=dtype)[1:-1, 1:-2],
        "column-major": lambda: poisoned(columns + 2, rows + 2, dtype=dtype)[1:-1, 1:-1].T,
        "every-second-column": lambda: poisoned(rows, 2 * columns, dtype=dtype)[:, ::2],
        "every-second-row": lambda: poisoned(2 * rows, columns, dtype=dtype)[::2],
    }
    return around[layout]().copy_(torch.randn(rows, columns, dtype=torch.float64))


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def draw_seeds(count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,)).to(DEVICE)


def keep_masks(seeds: Tensor | None, shape: tuple[int, int], p: float, count: int) -> list[Tensor]:
    """The torch backend's masks, or masks that keep everything where there is no seed."""
    if seeds is None:
        return [torch.ones(shape, dtype=torch.bool, device=DEVICE)] * count
    return [dropout_mask(seed, shape, p) for seed in seeds]


@contextmanager
def processors(count: int) -> Iterator[None]:
    """Launchers split an axis as for a device with so many processors."""
    target = target_of(torch.device(DEVICE))
    with use_target(replace(target, processors=count)):
        yield


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch inside the block, in order; each runs as usual."""
    records: list[Launch] = []

    def run(record: Launch) -> None:
        records.append(record)
        record.run()

    with intercept(run):
        yield records


def launched(run: Callable[[], object], target: Target | None = None) -> list[Launch]:
    """What ``run`` would launch, on this device or on a target: nothing does."""
    records: list[Launch] = []
    with use_target(target) if target else nullcontext(), intercept(records.append):
        run()
    return records


def moved(launches: Iterable[Launch]) -> int:
    """The bytes of all of them."""
    return sum(each.work().loaded + each.work().stored for each in launches)


@dataclass
class Traffic:
    """The addresses of all bytes that one direction moved, in order, repeated where they were."""

    tiles: list[np.ndarray] = field(default_factory=list)

    def add(self, pointers, mask: np.ndarray) -> None:
        """Of a tile of pointers, those under its mask: what sticks out of a matrix isn't moved."""
        first = pointers.data[mask]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self.tiles.append((first.reshape(-1, 1) + np.arange(size, dtype=np.uint64)).ravel())

    @property
    def total(self) -> int:
        return sum(map(len, self.tiles))

    def addresses(self) -> np.ndarray:
        """Each once, sorted."""
        return np.unique(np.concatenate(self.tiles)) if self.tiles else np.empty(0, np.uint64)


@dataclass
class Counted:
    """One launch: what it states about itself, and what it did."""

    launch: Launch
    stated: Work
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)

    def outside(self, tensors: Iterable[Tensor]) -> int:
        """Bytes loaded or stored, each once, that belong to none of these tensors."""
        count = 0
        for addresses in (self.loads.addresses(), self.stores.addresses()):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                inside = addresses - np.uint64(storage.data_ptr()) < storage.nbytes()
                addresses = addresses[~inside]
            count += len(addresses)
        return count


@contextmanager
def counted_launches() -> Iterator[list[Counted]]:
    """Runs and counts every launch inside the block.

    All loads and stores of the interpreter, through tensor descriptors too, end in its two masked
    ones; only atomics don't, which no kernel here has, and which fail in the block.
    """
    launches: list[Counted] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *rest, **named):
        launches[-1].loads.add(pointers, mask.data)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self, pointers, value, mask, *rest, **named):
        launches[-1].stores.add(pointers, mask.data)
        return store(self, pointers, value, mask, *rest, **named)

    def no_atomics(self, *arguments):
        raise AssertionError("an atomic operation: its bytes are not counted")

    def handler(record: Launch) -> None:
        launches.append(Counted(record, record.work()))
        record.run()

    replaced = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": no_atomics,
        "create_atomic_cas": no_atomics,
    }
    before = {name: getattr(InterpreterBuilder, name) for name in replaced}
    for name, function in replaced.items():
        setattr(InterpreterBuilder, name, function)
    try:
        with intercept(handler):
            yield launches
    finally:
        for name, function in before.items():
            setattr(InterpreterBuilder, name, function)


def buffers_of(made: CapturedCall) -> dict[str, Tensor]:
    """What a replay's buffers are like, by their names, in the order in which they are made."""
    made_by = re.findall(r"(\w+) = (\w*_buffer(?:_\d+)?)\(\)", made.source)
    scope = made.replay.__func__.__globals__
    return {name: scope[buffer].args[0] for name, buffer in made_by}
