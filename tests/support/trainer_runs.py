"""Runs of transformers' Trainer on tiny Llamas with dropout, in one or more processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from models import randomize, tiny_llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import fastlora

STEPS, VOCABULARY = 6, 20
SIZES = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": VOCABULARY}
ADAPTER = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.2}
# Settings of an adapter of a tiny Llama, by the other things that they train.
KINDS: dict[str, dict] = {
    "adapters": {},
    "biases": {"bias": "lora_only"},
    "all-biases": {"bias": "all"},
    "modules-to-save": {"modules_to_save": ["lm_head", "norm"]},
}
ARGUMENTS = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
ARGUMENTS |= {"logging_steps": 1, "save_steps": 3, "report_to": "none", "disable_tqdm": True}
ARGUMENTS |= {"use_cpu": True, "dataloader_pin_memory": False}


def base_model() -> nn.Module:
    torch.manual_seed(1)
    return tiny_llama(attention_bias=True, **SIZES)


def adapted(seed: int = 2, loss: bool = False, **kind) -> nn.Module:
    """An adapted model.  The base is always the same; the adapters depend on the seed."""
    model = base_model()
    torch.manual_seed(seed)
    config = peft.LoraConfig(**ADAPTER | kind)
    return randomize(fastlora.get_peft_model(model, config, loss=loss), 0.1)


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_for(
    model: nn.Module | None, folder: Path, kind: type[Trainer] = Trainer, **settings
) -> Trainer:
    others = {k: settings.pop(k) for k in ("processing_class", "model_init") if k in settings}
    arguments = TrainingArguments(**ARGUMENTS | {"output_dir": str(folder)} | settings)
    return kind(model, arguments, train_dataset=rows(), eval_dataset=rows(), **others)


class Stop(transformers.TrainerCallback):
    """Stops a training after half of the steps, as a crash would."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == STEPS // 2


def stopped_and_resumed(
    make: Callable[[int], nn.Module], folder: Path, kind: type[Trainer] = Trainer, **settings
) -> tuple[Trainer, Trainer]:
    """A run that is stopped and resumed with another model, and a run without interruption.

    ``make(seed)`` gives a model; the seed determines everything except the base.
    """

    def run(seed: int, name: str, *callbacks: Any, **how: Any) -> Trainer:
        trainer = trainer_for(make(seed), folder / name, kind, **settings)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(**how)
        return trainer

    whole, half = run(2, "whole"), run(2, "half", Stop())
    assert half.state.global_step == STEPS // 2
    return run(3, "half", resume_from_checkpoint=True), whole


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def frozen_bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


def result(trainer: Trainer) -> dict[str, Any]:
    """All results of a run: weights, optimizer, losses, gradient norms and learning rates."""
    log = [[entry["loss"], entry["grad_norm"], entry["learning_rate"]] for entry in losses(trainer)]
    return {"weights": weights(trainer.model), "state": trainer.optimizer.state_dict(), "log": log}


def losses(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def train_in_ranks(folder: str, resume_from: str | None = None) -> tuple[dict[str, Any], bool]:
    """The results of a run, and whether this rank wrote the adapter into its own folder."""
    rank = str(dist.get_rank())
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    AcceleratorState._reset_state(True)
    # The process group exists already, so nothing connects to this port.
    with mock.patch.dict(os.environ, ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}):
        trainer = trainer_for(adapted(seed=3 if resume_from else 2), Path(folder))
        assert trainer.args.world_size == dist.get_world_size()
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model(f"{folder}/{rank}")
    dist.barrier()
    return result(trainer), os.path.exists(f"{folder}/{rank}")
