"""What autograd keeps for a backward."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


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
