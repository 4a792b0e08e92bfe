"""What one side's training needs of memory, in a process of its own, when no other runs."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from train_one import load, make_trainer
from transformers import AutoTokenizer, Trainer

from fastlora.price.measure import Step

STEPS = 2  # the second has all that any later one has: activations, gradients, AdamW's moments


def main(run: SimpleNamespace) -> dict:
    run.steps = STEPS
    with contextlib.redirect_stdout(io.StringIO()):  # the training has said it all
        trainer = make_trainer(load(AutoTokenizer, run), run)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.evaluate()  # reads the weights from the disk, which are not to count
    return {
        "weights_resident": bytes_of_weights(trainer.model),
        "peak_memory_growth": peak_memory_growth(trainer.train, run.device),
        "kept_for_backward": bytes_kept_for_backward(trainer),
    }


def peak_memory_growth(train: Callable, device: str) -> int | None:
    """How much it adds at its peak: to a GPU's allocations, or to what this process has resident.

    Only Linux tells the latter: there the kernel's high-water mark can be reset.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = of_process("VmRSS")
    train()
    return of_process("VmHWM") - before


def of_process(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status)[1])


def bytes_of_weights(model: torch.nn.Module) -> int:
    """What all that doesn't train holds, with the scales and tables of 4 bits."""
    tensors = [each for each in model.parameters() if not each.requires_grad]
    for state in [each.quant_state for each in tensors if hasattr(each, "quant_state")]:
        tensors += [each for each in state.as_dict().values() if isinstance(each, torch.Tensor)]
    storages = [each.untyped_storage() for each in (*tensors, *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_kept_for_backward(trainer: Trainer) -> int:
    """What a forward of one training batch keeps until the backward, without the parameters."""
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    return Step(model, batch).kept_bytes()
