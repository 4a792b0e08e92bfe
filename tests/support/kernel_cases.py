"""Shared by the kernel tests: operands of any memory layout, and records of launches.

It also counts the bytes that a launch really loads and stores in Triton's interpreter.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from unittest import mock

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
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
LAYOUTS = ["contiguous", "window", "column-major", "every-second-column", "every-second-row"]


def random(rows: int, columns: int, dtype: torch.dtype = F32, layout: str = "contiguous") -> Tensor:
    """A random matrix.  Memory between and around its elements is NaN."""
    around = {
        "contiguous": lambda: torch.empty(rows, columns, dtype=dtype, device=DEVICE),
        # Every row still starts at a multiple of 16 bytes, so that a tensor descriptor can describe
        # it.
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
    """The torch backend's masks, or masks that keep everything if there are no seeds."""
    if seeds is None:
        return [torch.ones(shape, dtype=torch.bool, device=DEVICE)] * count
    return [dropout_mask(seed, shape, p) for seed in seeds]


@contextmanager
def processors(count: int) -> Iterator[None]:
    """Launchers split work as for a device with ``count`` processors."""
    target = target_of(torch.device(DEVICE))
    with use_target(replace(target, processors=count)):
        yield


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Records every launch in the block, in order.  Each launch still runs."""
    records: list[Launch] = []

    def run(record: Launch) -> None:
        records.append(record)
        record.run()

    with intercept(run):
        yield records


def launched(run: Callable[[], object], target: Target | None = None) -> list[Launch]:
    """The launches that ``run`` makes, for this device or for a target.  None is executed."""
    records: list[Launch] = []
    with use_target(target) if target else nullcontext(), intercept(records.append):
        run()
    return records


def moved(launches: Iterable[Launch]) -> int:
    """The total of bytes loaded and stored."""
    return sum(each.work().loaded + each.work().stored for each in launches)


@dataclass
class Traffic:
    """The addresses of all bytes that were loaded (or stored), in order and with repetitions."""

    tiles: list[np.ndarray] = field(default_factory=list)

    def add(self, pointers, mask: np.ndarray) -> None:
        """Add the addresses that a tile's mask selects; masked-out elements aren't transferred."""
        first = pointers.data[mask]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self.tiles.append((first.reshape(-1, 1) + np.arange(size, dtype=np.uint64)).ravel())

    @property
    def total(self) -> int:
        return sum(map(len, self.tiles))

    def addresses(self) -> np.ndarray:
        """All addresses without repetitions, sorted."""
        return np.unique(np.concatenate(self.tiles)) if self.tiles else np.empty(0, np.uint64)


@dataclass
class Counted:
    """One launch: the ``Work`` it states, and the bytes it really transferred."""

    launch: Launch
    stated: Work
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)

    def outside(self, tensors: Iterable[Tensor]) -> int:
        """The number of different bytes loaded or stored that belong to none of these tensors."""
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
    """Run every launch in the block and count its bytes.

    In the interpreter, all loads and stores, also through tensor descriptors, end in two functions:
    the masked load and the masked store.  Only atomics bypass them; no kernel here has one, and the
    block raises an error on one.
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
    with mock.patch.multiple(InterpreterBuilder, **replaced), intercept(handler):
        yield launches


def buffers_of(made: CapturedCall) -> dict[str, Tensor]:
    """The buffers that a replay allocates, by their names, in the order of allocation."""
    made_by = re.findall(r"(\w+) = (\w*_buffer(?:_\d+)?)\(\)", made.source)
    scope = made.replay.__func__.__globals__
    return {name: scope[buffer].args[0] for name, buffer in made_by}
