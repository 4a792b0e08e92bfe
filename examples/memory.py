"""The memory that one side's training needs, in its process or on the GPU."""

import re
from pathlib import Path

import torch
from transformers import Trainer

from fastlora.estimates import kept_bytes


class Growth:
    """The peak growth from now on: of a GPU's allocations, or of this process's resident memory.

    The growth of resident memory is known only on Linux, where its high-water mark can be reset.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu, self.known = device == "cuda", True
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = of_process("VmRSS")
        except OSError:
            self.known = False

    def bytes(self) -> int | None:
        if not self.known:
            return None
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else of_process("VmHWM")
        return peak - self.before


def of_process(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status)[1])


def bytes_of_weights(model: torch.nn.Module) -> int:
    """The bytes of all frozen weights and buffers, with the scales and tables of 4-bit weights."""
    tensors = [each for each in model.parameters() if not each.requires_grad]
    for state in [each.quant_state for each in tensors if hasattr(each, "quant_state")]:
        tensors += [each for each in state.as_dict().values() if isinstance(each, torch.Tensor)]
    storages = [each.untyped_storage() for each in (*tensors, *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_kept_for_backward(trainer: Trainer) -> int:
    """The bytes that a forward of one training batch saves for backward, without parameters."""
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    return kept_bytes(model, batch)
