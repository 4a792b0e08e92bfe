"""What has to be measured: the time of forward and backward, and what is kept in between."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ..layers.batch import call, loss_and_outputs


class Step:
    """Forward and backward of a model on one batch."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.device = next(model.parameters()).device

    def seconds(self) -> float:
        """Of forward and backward; gradients are new, as after ``zero_grad``."""
        self.model.zero_grad()
        self._wait()
        start = time.perf_counter()
        self._loss().backward()
        self._wait()
        return time.perf_counter() - start

    def kept_bytes(self) -> int:
        """What a forward keeps until the backward, without parameters and buffers.

        Only what autograd knows of is counted: tensors, each memory once.
        """
        own = {
            storage.data_ptr()
            for tensor in (*self.model.parameters(), *self.model.buffers())
            for storage in _storages(tensor)
        }
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            for storage in _storages(tensor):
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the same memory; to keep the tensor itself would make a cycle

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._loss()
        del loss  # not before: it holds the graph, so that no address came twice
        return sum(kept.values())

    def _loss(self) -> Tensor:
        return loss_and_outputs(call(self.model, self.batch))[0]

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The memory of a tensor, or of all that one of a wrapping class (torchao's) is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    names, _ = tensor.__tensor_flatten__()
    return [storage for name in names for storage in _storages(getattr(tensor, name))]


@contextmanager
def frozen(model: nn.Module, batch: Any) -> Iterator[None]:
    """Inside, no parameter trains, and a backward goes to the embeddings or the batch's floats.

    That is what a backward through frozen layers costs.  Raises ValueError where neither is there.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.is_floating_point()]
    embeddings = _embeddings(model)
    if embeddings is None and not inputs:
        raise ValueError(
            "the frozen model has nothing to differentiate: batch has no float tensor, and the "
            "model no get_input_embeddings()"
        )
    inputs = [x for x in inputs if not x.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    for x in inputs:
        x.requires_grad_(True)
    handle = None
    if embeddings is not None:
        handle = embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_(True))
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for x in inputs:
            x.requires_grad_(False)
            x.grad = None


def _embeddings(model: nn.Module) -> nn.Module | None:
    """What transformers' models say their embeddings are."""
    get: Callable[[], Any] | None = getattr(model, "get_input_embeddings", None)
    try:
        found = None if get is None else get()
    except NotImplementedError:  # a model that has none
        return None
    return found if isinstance(found, nn.Module) else None
