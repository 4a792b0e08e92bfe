"""transformers' Trainer and TRL's train optimised models as PEFT's.

Both sides have the same dropout masks in the adapters (``shared_masks``).  Most is in float64,
where all that isn't rounding shows.
"""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import tiny_llama
from peft_llama import LAYERS, ROUNDING, STEPS, llama, result
from peft_models import (
    BATCH,
    VOCABULARY,
    assert_runs_the_same,
    assert_same,
    counted_calls,
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


@pytest.fixture
def words():
    """A tokenizer that knows the words w0 to w99."""
    tokenizers = pytest.importorskip("tokenizers")
    numbers = {f"w{i}": i for i in range(VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", eos_token="w1", unk_token="w2"
    )


def test_sft_trainer(words, tmp_path):
    """TRL makes the PeftModel, which is then optimised; it checkpoints blocks."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    adapter = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}
    config = peft.LoraConfig(**adapter, init_lora_weights="gaussian", task_type="CAUSAL_LM")
    texts = [" ".join(f"w{i}" for i in row) for row in BATCH.tolist()]
    few = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "bf16": False}
    few |= {"packing": True, "packing_strategy": "wrapped", "max_length": 24}
    arguments = ARGUMENTS | {"output_dir": str(tmp_path)} | few
    base, found = tiny_llama(), []
    for optimizing in (False, True):
        torch.manual_seed(3)
        trainer = trl.SFTTrainer(
            copy.deepcopy(base),
            trl.SFTConfig(**arguments),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=words,
            peft_config=copy.deepcopy(config),
        )
        trainer.model.double()
        if optimizing:
            fastlora.optimize(trainer.model)
        with counted_calls() as calls:
            found.append(run(trainer))
        assert len(calls) == LAYERS * 4 * 2 * optimizing
    expected, got = found
    assert_same(got, expected, ROUNDING)
