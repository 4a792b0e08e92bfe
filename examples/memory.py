"""What one side's training needs of memory, in a process of its own, when no other runs."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import torch
from train_one import add_adapter, load, load_model, make_rows, make_trainer
from transformers import AutoTokenizer, Trainer

STEPS = 2  # the second has all that any later one has: activations, gradients, AdamW's moments


def main(run: SimpleNamespace) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):  # the training has said it all
        return measure(run)


def measure(run: SimpleNamespace) -> dict:
    run.steps = STEPS
    training, held_out = make_rows(load(AutoTokenizer, run), run)
    model = add_adapter(load_model(run), run)
    trainer = make_trainer(model, training, held_out[: run.batch], run)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.evaluate()  # reads the weights from the disk, which are not to count
    peak = PeakMemory(run.device)
    trainer.train()
    return {
        "peak_memory_growth": peak.growth(),
        "kept_for_backward": bytes_kept_for_backward(trainer, run.batch),
    }


class PeakMemory:
    """The growth of memory from here to its peak: of a GPU's allocations, or of this process.

    The process's is known on Linux alone, where the kernel's high-water mark can be reset.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.start: int | None = None
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._of_process("VmRSS")
        except OSError:
            pass

    def growth(self) -> int | None:
        if self.start is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else self._of_process("VmHWM")
        return peak - self.start

    def _of_process(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def bytes_kept_for_backward(trainer: Trainer, batch: int) -> int:
    """What a forward of one training batch keeps until the backward, without the parameters."""
    model, device = trainer.model.train(), trainer.args.device
    rows = torch.stack([trainer.train_dataset[i]["input_ids"] for i in range(batch)]).to(device)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the same memory; to keep the tensor itself would make a cycle

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=rows, labels=rows).loss
    del loss  # not before: it holds the graph, so that no address came twice
    return sum(kept.values())
