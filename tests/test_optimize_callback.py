"""``Optimize``: a callback that optimizes the model of transformers' Trainer and TRL's trainers."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import tiny_llama
from torch import nn
from trainer_runs import ARGUMENTS, base_model, losses, rows
from transformers import Trainer, TrainingArguments

import fastlora
from fastlora.peft.learning import embedding_notes
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


def test_the_trainer_of_0_4_is_an_error_that_names_the_page():
    with pytest.raises(ImportError, match=r"use transformers\.Trainer \(docs/from-0\.4\.md\)"):
        from fastlora.trainer import AdapterTrainer  # noqa: F401


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


class Skips(nn.Module):
    """A model with a layer that its loss doesn't depend on."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


NOTE = "adapters without a gradient in the first step: "


def step_of(model: nn.Module, scale: float = 1.0) -> None:
    optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
    (model(torch.ones(2, 8)).sum() * scale).backward()
    optimizer.step()


@pytest.fixture
def skipping(log) -> nn.Module:
    """A model with PEFT's adapters on two layers, under ``auto``; only one of them trains."""
    fastlora.auto()
    yield peft.get_peft_model(Skips(), peft.LoraConfig(target_modules=["used", "unused"]))
    fastlora.auto(False)


def test_adapters_without_a_gradient_in_the_first_step_are_named_once(skipping, log):
    assert NOTE not in str(fastlora.coverage(skipping))
    for _ in range(2):
        step_of(skipping)
    assert len([text for level, text in log() if level == "WARNING" and NOTE in text]) == 1
    assert f"{NOTE}base_model.model.unused: " in str(fastlora.coverage(skipping))


def test_a_step_without_any_gradient_says_nothing_about_adapters(skipping, log):
    step_of(skipping, scale=0.0)
    assert not [text for level, text in log() if level == "WARNING"]
    step_of(skipping)
    assert NOTE in log()[-1][1]


def test_in_a_trainer_a_frozen_part_is_named(tmp_path, log):
    model = peft_model()
    first = model.base_model.model.model.layers[0]
    first.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    trainer_of(tmp_path, model, Optimize()).train()
    (text,) = [text for level, text in log() if level == "WARNING"]
    assert text.startswith(f"{NOTE}base_model.model.model.layers.0.self_attn.q_proj, ")
    assert "and 4 more: " in text


TIED = {"tie_word_embeddings": True}
IN_FULL, BOTH = {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head", "embed_tokens"]}
TOGETHER = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
TOKENS = {"trainable_token_indices": [3]}
APART = "model.embed_tokens and lm_head share one weight (tie_word_embeddings), but train apart"


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")
@pytest.mark.parametrize(
    ("base", "settings", "warned"),
    [
        (TIED, IN_FULL, True), (TIED, BOTH, True), (TIED, {"target_modules": ["lm_head"]}, True),
        (TIED, TOGETHER, False), (TIED, TOKENS, False), (TIED, {}, False), ({}, IN_FULL, False),
    ],
    ids=["head", "both", "adapter", "together", "tokens", "frozen", "untied"],
)  # fmt: skip
def test_tied_embeddings_that_train_apart_are_a_warning(base, settings, warned):
    config = peft.LoraConfig(**{"target_modules": ["q_proj"]} | settings)
    model = peft.get_peft_model(tiny_llama(**base), config)
    assert [note.startswith(APART) for note in embedding_notes(model)] == [True] * warned


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("settings", [{}, TOKENS], ids=["frozen", "trained"])
def test_new_tokens_that_don_t_train_are_a_warning_at_the_first_checkpoint(settings, tmp_path, log):
    base_model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(24)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], **settings))
    trainer_of(tmp_path, model, Optimize()).train()  # saves twice
    said = [text for _, text in log() if text.startswith("the vocabulary was resized")]
    assert len(said) == (0 if settings else 1)
