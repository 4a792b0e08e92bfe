"""transformers' Trainer and TRL's train optimised models as PEFT's.

Both sides have the same dropout masks in the adapters (``shared_masks``).  Most is in float64,
where all that isn't rounding shows.
"""

import copy
from pathlib import Path

import pytest
from peft_llama import LAYERS, ROUNDING, STEPS, llama, result
from peft_models import (
    BATCH,
    assert_runs_the_same,
)
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastlora
from fastlora.peft.masks import shared_masks

whenever = pytest.mark.parametrize("when", ["before", "after", "on_train_begin"])


class OptimizeOnTrainBegin(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        fastlora.optimize(model)


ARGUMENTS = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
ARGUMENTS |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
ARGUMENTS |= {"use_cpu": True, "dataloader_pin_memory": False}


def trainer_for(model: nn.Module, folder: Path, when: str = "never", **settings) -> Trainer:
    """A Trainer of a few steps; ``when`` says when the model is optimised."""
    if when == "before":
        fastlora.optimize(model)
    rows = [{"input_ids": row, "labels": row} for row in BATCH]
    trainer = Trainer(
        model,
        TrainingArguments(**ARGUMENTS | {"output_dir": str(folder)} | settings),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[OptimizeOnTrainBegin()] if when == "on_train_begin" else [],
    )
    if when == "after":
        fastlora.optimize(model)
    return trainer


def run(trainer: Trainer, **settings) -> dict[str, Tensor]:
    """Train: the losses of the log, and the adapter."""
    with shared_masks(trainer.model):
        trainer.train(**settings)
    entries = trainer.state.log_history
    losses = [entry[k] for entry in entries for k in ("loss", "eval_loss") if k in entry]
    return result(trainer.model, losses)


@whenever
def test_trainer_whenever_the_model_is_optimised(when, tmp_path):
    theirs = llama()
    ours = copy.deepcopy(theirs)

    def train(model):
        return run(trainer_for(model, tmp_path, when if model is ours else "never"))

    got = assert_runs_the_same(train, theirs, ours, fast=LAYERS * STEPS, tolerance=ROUNDING)
    assert got["losses"].shape == (STEPS,)
    assert got["losses"][-1] < got["losses"][0] - 0.05
