"""What autograd keeps for a backward, and the most that lives at one time."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastlora.backends import Call
from fastlora.backends import torch as torch_backend
from fastlora.ops.door import draw_seed
from fastlora.projection import Output, flatten, layouts_of


def saved_bytes(run: Callable[[], Any], apart_from: Iterable[Tensor] = ()) -> dict[int, int]:
    """Bytes of every storage that autograd saves while ``run`` runs, by its address.

    What ``run`` returns is kept until it ends, so that no memory is used twice.
    """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = run()
    assert keep is not None
    for tensor in apart_from:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return storages


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, until they are freed."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0
        for tensor in tensors:
            self.note(tensor)

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)
        return tensor

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return tree_map_only(Tensor, self.note, func(*args, **(kwargs or {})))


def peak_bytes(tensors: Iterable[Tensor], run: Callable[[], object]) -> tuple[int, int, int]:
    """Bytes that live before ``run``, at most during it, and after it: of these tensors and new."""
    live = _Live(tensors)
    before = live.now
    with live:
        run()
    return before, live.peak, live.now


def run_torch_backend(
    x: Tensor, outputs: Sequence[Output], p: float, frozen: bool = False
) -> list[Tensor | None]:
    """Forward and backward of the backend itself, so that a mode sees what it does.

    All gradients, or if the bases are ``frozen`` those of what needs one.
    """
    layouts = layouts_of(outputs)
    settings = Call(layouts, p, torch_backend)
    given = x, *flatten(outputs, layouts)
    inputs = [tensor.detach() for tensor in given]
    needs = [tensor.requires_grad or not frozen for tensor in given]
    seeds = draw_seed(sum(len(output.adapters) for output in outputs), x.device) if p else None
    ys, hs = torch_backend.forward(inputs, seeds, settings)
    return torch_backend.backward(ys, inputs, hs, needs, seeds, settings)
