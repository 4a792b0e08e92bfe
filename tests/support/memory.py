"""What autograd keeps for a backward."""

import torch


def saved_bytes(run) -> dict[int, int]:
    """Bytes of every storage that autograd saves while ``run`` runs, by its address."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = run()
    assert keep is not None
    return storages
