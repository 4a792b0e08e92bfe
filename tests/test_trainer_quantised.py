"""Trainer and AdapterTrainer over quantised bases, as from_pretrained makes them.

A run that stops and goes on, in a new process's model, is the run without a stop, bit for bit.
"""

import copy
import pickle

import pytest
import torch
from models import randomise
from quantised_bases import KINDS, UNSAVED, quantised_base
from torch import nn
from trainer_runs import STEPS, Stop, losses, trainer_for
from transformers import Trainer

import fastlora
from fastlora.trainer import AdapterTrainer

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each kind of base lies."""
    root = tmp_path_factory.mktemp("bases")

    def of(kind):
        (root / kind).mkdir(exist_ok=True)
        return root / kind

    return of


def adapted(kind: str, folder, seed: int = 2) -> nn.Module:
    model = quantised_base(kind, folder(kind))
    torch.manual_seed(seed)
    every = kind == "float8"  # whose own layers compute on a GPU alone
    targets = "all-linear" if every else r".*\.(q_proj|down_proj|w2)"
    config = fastlora.LoRAConfig(r=4, target_modules=targets, lora_dropout=0.2)
    return randomise(fastlora.apply_lora(model, config), 0.1)


def outcome(trainer: Trainer) -> tuple:
    trained = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    return trained, [entry["loss"] for entry in losses(trainer)], trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("trainer", [Trainer, AdapterTrainer])
@kinds
def test_a_resumed_run_is_the_run_without_a_stop(kind, trainer, folder, tmp_path):
    if trainer is Trainer and kind in UNSAVED:
        pytest.skip("refused: see below")
    whole = trainer_for(adapted(kind, folder), tmp_path / "whole", trainer, **EVALUATED)
    whole.train()
    half = trainer_for(adapted(kind, folder), tmp_path / "half", trainer, **EVALUATED)
    half.add_callback(Stop())
    half.train()
    resumed = trainer_for(adapted(kind, folder, seed=3), tmp_path / "half", trainer, **EVALUATED)
    resumed.train(resume_from_checkpoint=True)

    (got, *numbers), (expected, *expected_numbers) = outcome(resumed), outcome(whole)
    assert len(numbers[0]) == STEPS
    assert numbers == expected_numbers
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    start = [p for p in adapted(kind, folder).parameters() if p.requires_grad]
    assert not any(torch.equal(*pair) for pair in zip(got, start, strict=True))


@pytest.mark.parametrize("trainer", [Trainer, AdapterTrainer])
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "float8"])
def test_the_best_one_is_loaded_at_the_end(kind, trainer, folder, tmp_path):
    if trainer is Trainer and kind in UNSAVED:
        pytest.skip("refused: see below")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 1}
    best |= {"greater_is_better": True}  # so that it isn't the last
    run = trainer_for(adapted(kind, folder), tmp_path, trainer, **EVALUATED | best)
    run.train()
    assert run.state.best_global_step == 1
    assert run.evaluate()["eval_loss"] == run.state.best_metric


@pytest.mark.parametrize("kind", UNSAVED)
def test_trainer_refuses_at_once_what_transformers_can_t_save(kind, folder, tmp_path):
    message = r"can't save this quantised base .*use fastlora\.trainer\.AdapterTrainer"
    model = adapted(kind, folder)
    for _ in range(2):  # the second one after an AdapterTrainer
        with pytest.raises(ValueError, match=message):
            trainer_for(model, tmp_path / "out", Trainer)
        trainer_for(model, tmp_path / "out")


def test_without_adapters_it_is_transformers_base_again(folder, tmp_path):
    model = adapted("nf4", folder)
    fastlora.remove_lora(model)
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer_for(model, tmp_path / "out", Trainer)


def test_model_init_makes_a_quantised_model(folder, tmp_path):
    run = trainer_for(None, tmp_path, max_steps=1, model_init=lambda: adapted("gguf", folder))
    run.train()
    assert len(losses(run)) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_too(copied, folder, tmp_path):
    model = copied(adapted("int8", folder))
    trainer_for(model, tmp_path, Trainer, max_steps=1).train()
    fastlora.remove_lora(model)
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer_for(model, tmp_path, Trainer)
