"""``Optimize``: a callback that optimizes the model of transformers' Trainer and TRL's trainers."""

from pathlib import Path

import peft
import pytest
import torch
from trainer_runs import ARGUMENTS, base_model, losses, rows
from transformers import Trainer, TrainingArguments

import fastlora
from fastlora.trainer import Optimize

CONFIG = peft.LoraConfig(r=4, target_modules="all-linear")
SAID = "14 of 14 layers fast (backend torch); 2 of 2 gated MLPs as one block"


def peft_model() -> peft.PeftModel:
    base = base_model()
    torch.manual_seed(2)
    return peft.get_peft_model(base, CONFIG)


def trainer_of(folder: Path, model, *callbacks, **settings) -> Trainer:
    arguments = TrainingArguments(**ARGUMENTS, output_dir=str(folder))
    return Trainer(model, arguments, train_dataset=rows(), callbacks=[*callbacks], **settings)


def test_the_model_is_fast_before_training_and_the_losses_are_peft_s(tmp_path, log):
    trainer = trainer_of(tmp_path, peft_model(), Optimize())
    assert not fastlora.coverage(trainer.model).not_fast
    trainer.train()
    assert log() == [("INFO", SAID)]
    plain = trainer_of(tmp_path, peft_model())
    plain.train()
    mine, theirs = ([step["loss"] for step in losses(each)] for each in (trainer, plain))
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert fastlora.coverage(plain.model).not_fast


def test_a_model_that_training_makes_is_fast(tmp_path, log):
    made = []

    def make() -> peft.PeftModel:
        made.append(peft_model())
        return made[-1]

    trainer = trainer_of(tmp_path, None, Optimize(gated_mlps=False), model_init=make)
    trainer.train()
    assert len(made) == 2
    assert trainer.model is made[1]
    assert not fastlora.coverage(trainer.model).not_fast
    assert not any(mlp.fast for mlp in fastlora.coverage(trainer.model).gated_mlps)
    assert len(log()) == 2


def test_added_later_it_optimizes_at_the_start_of_each_training_and_logs_once(tmp_path, log):
    trainer = trainer_of(tmp_path, peft_model())
    trainer.add_callback(Optimize())
    trainer.train()
    assert not fastlora.coverage(trainer.model).not_fast
    fastlora.restore(trainer.model)
    trainer.train()
    assert not fastlora.coverage(trainer.model).not_fast
    assert log() == [("INFO", SAID)]


def test_a_model_without_lora_layers_is_an_error_before_the_first_step(tmp_path):
    trainer = trainer_of(tmp_path, base_model(), Optimize())
    with pytest.raises(ValueError, match="has no PEFT LoRA layers"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match="no setting 'gates'"):
        Optimize(gates=True)
