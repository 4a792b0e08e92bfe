"""What a launch really loads and stores, counted byte by byte in Triton's interpreter."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from fastlora.kernels.launch import Launch, Work, intercept


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
