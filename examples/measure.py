"""What a training run costs: seconds a step, peak memory, and bytes that wait for the backward."""

import time
from pathlib import Path

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback


class StepWatch(TrainerCallback):
    """The seconds of each whole step (forward, backward, optimizer), without evaluations."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.start = self._now(args.device)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(self._now(args.device) - self.start)

    @property
    def median(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class LossBar(ProgressCallback):
    """Trainer's progress bar, with the loss in it rather than on lines of its own."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(f"training with {self.side}")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


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
