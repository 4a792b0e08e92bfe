"""AdapterTrainer: transformers' Trainer with checkpoints that hold only fastlora's adapters.

The models are tiny Llamas with dropout in the adapters.  "The same" means bit-equal.
"""

import copy
import functools
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import randomize, refused
from pages import tiny_tokenizer
from peft_models import assert_same
from process import Ranks
from safetensors import safe_open
from torch import nn
from trainer_runs import (
    ADAPTER,
    KINDS,
    STEPS,
    VOCABULARY,
    adapted,
    base_model,
    frozen_bits,
    losses,
    result,
    stopped_and_resumed,
    train_in_ranks,
    trainer_for,
    weights,
)
from transformers import Trainer

import fastlora
from fastlora.trainer import AdapterTrainer, MergedSampling

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
EVERY_STEP = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
BEST = EVERY_STEP | {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # so that it isn't the last
}


@kinds
def test_a_resumed_run_is_the_run_without_a_stop(kind, tmp_path):
    settings = {"gradient_accumulation_steps": 1 if kind else 2}
    resumed, whole = stopped_and_resumed(partial(adapted, **kind), tmp_path, **settings)
    expected = result(whole)
    assert len(expected["log"]) == STEPS
    assert_same(result(resumed), expected, 0.0)


@pytest.mark.skipif(
    not hasattr(transformers.modeling_utils, "save_on_cpu"), reason="needs transformers 5.17"
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["own", "optimized"])
def test_offloaded_checkpoints_change_no_bit(kind, tmp_path, monkeypatch):
    stores, store = [], transformers.modeling_utils.save_on_cpu
    monkeypatch.setattr(
        transformers.modeling_utils,
        "save_on_cpu",
        lambda **settings: stores.append(settings) or store(),
    )

    def run(name: str, **settings) -> dict[str, Any]:
        model = adapted()
        if kind == "optimized":
            torch.manual_seed(2)
            config = peft.LoraConfig(**ADAPTER, init_lora_weights=False)
            model = fastlora.optimize(peft.get_peft_model(base_model(), config), loss=True)
        trainer = AdapterTrainer if kind == "own" else Trainer
        trainer = trainer_for(model, tmp_path / name, trainer, **settings)
        trainer.train()
        return result(trainer)

    expected = run("plain")
    assert not stores
    settings = {"gradient_checkpointing_kwargs": {"offload": True}}
    assert_same(run("offload", gradient_checkpointing=True, **settings), expected, 0.0)
    assert len(stores) == 2 * STEPS  # each of the two blocks in each step


@pytest.mark.parametrize(
    ("name", "trainer"),
    [
        ("mixtral", Trainer),
        ("nemotron", Trainer),
        ("gpt-oss", AdapterTrainer),
    ],
)
def test_a_resumed_mixture_is_the_run_without_a_stop(name, trainer, tmp_path):
    """transformers saves Mixtral's experts, and all of Nemotron, under other names."""
    moe_models = pytest.importorskip("moe_models")

    def mixture(seed):
        torch.manual_seed(1)
        model = moe_models.base_model(name, vocab_size=VOCABULARY)
        targets = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        targets |= {"target_parameters": moe_models.parameters_of(name)}
        torch.manual_seed(seed)
        return randomize(fastlora.apply_lora(model, fastlora.LoRAConfig(r=2, **targets)), 0.1)

    assert_same(*map(result, stopped_and_resumed(mixture, tmp_path, trainer)), 0.0)


def test_the_best_adapter_is_loaded_at_the_end(tmp_path, caplog):
    kind = KINDS["modules-to-save"]
    trainer = trainer_for(adapted(**kind), tmp_path, **BEST, save_total_limit=2)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", f"checkpoint-{STEPS}"}
    for step, is_best in ((1, True), (STEPS, False)):
        saved = fastlora.load_adapter(adapted(**kind), tmp_path / f"checkpoint-{step}")
        same = [saved.state_dict()[k].equal(v) for k, v in trainer.model.state_dict().items()]
        assert all(same) == is_best
    before = weights(trainer.model)
    trainer.state.best_model_checkpoint = str(tmp_path / "on-another-machine")
    with caplog.at_level("WARNING", "transformers"):
        trainer._load_best_model()
    assert "Could not locate the best model" in caplog.text
    assert_same(weights(trainer.model), before, 0.0)


@pytest.fixture
def words():
    """A tokenizer that can pad."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_a_checkpoint_has_the_files_of_trainer_s_for_a_peft_model(words, tmp_path):
    theirs = peft.get_peft_model(base_model(), peft.LoraConfig(**ADAPTER))
    for folder, model, kind in (("theirs", theirs, Trainer), ("ours", adapted(), AdapterTrainer)):
        trainer_for(model, tmp_path / folder, kind, max_steps=3, processing_class=words).train()
    names, ours = (
        {path.name for path in (tmp_path / folder / "checkpoint-3").iterdir()}
        for folder in ("theirs", "ours")
    )
    assert {"adapter_model.safetensors", "tokenizer.json", "training_args.bin"} < names
    assert ours == names - {"README.md"}  # PEFT also writes the model's card
    files = [tmp_path / f / "checkpoint-3/adapter_model.safetensors" for f in ("theirs", "ours")]
    assert keys_of(files[0]) == keys_of(files[1])


def keys_of(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_save_model_writes_to_a_folder_with_the_collator_s_tokenizer(words, tmp_path):
    trainer = trainer_for(adapted(), tmp_path)
    trainer.data_collator = transformers.DataCollatorWithPadding(words)
    for folder in (None, tmp_path / "saved"):
        trainer.save_model(folder)
        folder = folder or tmp_path
        assert (folder / "tokenizer.json").is_file()
        loaded = fastlora.load_adapter(base_model(), folder)
        assert_same(weights(loaded), weights(trainer.model), 0.0)


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    trainer = trainer_for(adapted(), tmp_path, save_total_limit=1)

    def full_disk(model, folder):
        if folder.endswith(f"checkpoint-{STEPS}"):
            raise OSError("the disk is full")
        fastlora.save_adapter(model, folder)

    monkeypatch.setattr("fastlora.trainer.save_adapter", full_disk)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    monkeypatch.undo()
    resumed = trainer_for(adapted(), tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(resumed)) == STEPS


NO_ADAPTERS = "has no adapters .* call fastlora.apply_lora.* use transformers.Trainer"
MODELS = {
    "plain": (base_model, NO_ADAPTERS),
    "peft": (lambda: peft.get_peft_model(base_model(), peft.LoraConfig(**ADAPTER)), NO_ADAPTERS),
    "changed": (lambda: changed(adapted()), "adapters changed after apply_lora"),
}


def changed(model: nn.Module) -> nn.Module:
    model.model.layers[0].mlp.down_proj = nn.Linear(24, 16)
    return model


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
def test_a_model_that_it_can_t_save_is_refused_at_once(make, message, tmp_path):
    model = make()
    with refused(model, message):
        trainer_for(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        trainer_for(None, tmp_path / "out", model_init=make)


def test_no_model(tmp_path):
    with pytest.raises(TypeError, match=r"^model is .* but must be a torch\.nn\.Module"):
        trainer_for("gpt2", tmp_path / "out")


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_with_checkpoints_of_their_own_are_refused_at_once(engine, tmp_path):
    class Engine(AdapterTrainer):
        """Simulates the settings by accelerate's plugin for the engine."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, f"is_{engine}_enabled", True)

    with pytest.raises(
        ValueError, match=f"(?i)only adapters under {engine}.*use transformers.Trainer"
    ):
        trainer_for(adapted(), tmp_path, Engine)


def test_a_model_that_is_sharded_already_is_refused_at_once(tmp_path):
    model = adapted()
    # FSDP1 marks its flattened parameters with this attribute
    model.lm_head.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match="only adapters under FSDP"):
        trainer_for(model, tmp_path)


def test_in_ddp_one_rank_writes_and_a_resumed_run_is_the_run_without_a_stop(tmp_path):
    ranks = Ranks(2, tmp_path)
    expected = ranks.run(train_in_ranks, str(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}")
    resumed = ranks.run(train_in_ranks, str(tmp_path / "resumed"), checkpoint)
    ranks.close()
    assert [wrote for _, wrote in expected] == [True, False]
    for (one, _), (other, _) in zip(resumed, expected, strict=True):
        assert_same(one, other, 0.0)


class Sample(transformers.TrainerCallback):
    """Records after each step whether ``generate`` saw merged layers."""

    def __init__(self) -> None:
        self.merged = []

    def on_step_end(self, args, state, control, model, **kwargs):
        def look(*_):
            self.merged.append(model.get_decoder().layers[0].self_attn.q_proj.merged)

        with model.get_input_embeddings().register_forward_hook(look):
            ids = torch.ones(1, 3, dtype=torch.long)
            assert model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2).shape == (1, 5)


def sampling_trainer(kind: str, folder: Path, *callbacks: Any) -> Trainer:
    config = peft.LoraConfig(**ADAPTER, init_lora_weights=False)
    model = adapted() if kind == "own" else peft.get_peft_model(base_model(), config)
    if kind == "optimized":
        fastlora.optimize(model)
    trainer = trainer_for(model, folder, AdapterTrainer if kind == "own" else Trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize(
    ("kind", "keep"), [("peft", "device"), ("optimized", "cpu"), ("own", "device")]
)
def test_samples_in_training_are_merged_and_the_bits_stay(kind, keep, tmp_path):
    sample = Sample()
    trainer = sampling_trainer(kind, tmp_path, MergedSampling(keep=keep), sample)
    before = frozen_bits(trainer.model)
    trainer.train()
    assert sample.merged == [True] * 2 * STEPS
    assert "generate" not in vars(trainer.model)
    assert all(map(torch.equal, frozen_bits(trainer.model), before))


def begin(model: nn.Module) -> MergedSampling:
    sampling = MergedSampling()
    sampling.on_train_begin(None, None, None, model=model)
    return sampling


def is_sampled_merged(model: nn.Module) -> bool:
    sample = Sample()
    sample.on_step_end(None, None, None, model)
    return all(sample.merged)


@pytest.mark.parametrize("order", ["12", "21", "1", "2"])
@pytest.mark.parametrize("somebody_s", [False, True])
def test_callbacks_on_one_model_end_in_any_order_or_not_at_all(order, somebody_s, tmp_path):
    """The second one finds a training that goes on, or one that an error has ended."""
    model = sampling_trainer("peft", tmp_path).model
    before = model.generate
    if somebody_s:
        vars(model)["generate"] = before
    bits = frozen_bits(model)
    callbacks = {"1": begin(model), "2": begin(model)}
    assert is_sampled_merged(model)
    for number in order:
        callbacks[number].on_train_end(None, None, None)
        assert is_sampled_merged(model) == (number == "1" and "2" not in order[: order.find("1")])
    if "2" not in order:  # an error
        begin(model).on_train_end(None, None, None)
    assert not is_sampled_merged(model)
    assert (vars(model).get("generate") is before) == somebody_s
    assert all(map(torch.equal, frozen_bits(model), bits))


def test_a_training_that_cannot_be_sampled_merged_puts_back_another_one_s(tmp_path):
    model = sampling_trainer("peft", tmp_path).model
    begin(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        begin(model)
    assert "generate" not in vars(model)


def test_a_function_around_generate_stays_and_samples_as_before(tmp_path):
    model = sampling_trainer("peft", tmp_path).model
    first = begin(model)
    merged_generate = model.generate
    vars(model)["generate"] = around = functools.wraps(merged_generate)(
        lambda *args, **named: merged_generate(*args, **named)
    )
    second = begin(model)  # the first one's runs inside of it
    assert is_sampled_merged(model)
    second.put_back()
    assert model.generate is around
    assert is_sampled_merged(model)
    first.put_back()
    assert model.generate is around
    assert not is_sampled_merged(model)


def test_a_copy_of_a_model_in_training_trains_by_itself(tmp_path):
    model = sampling_trainer("peft", tmp_path).model
    vars(model)["generate"] = model.generate
    sampling = begin(model)
    copied = copy.deepcopy(model)
    begin(copied).put_back()
    assert copied.generate.__self__ is copied
    assert not is_sampled_merged(copied)
    assert is_sampled_merged(model)
    sampling.put_back()
    assert not is_sampled_merged(model)


@pytest.mark.parametrize("kind", ["peft", "own"])
def test_a_copy_in_training_samples_from_its_own_weights(kind, tmp_path):
    model = sampling_trainer(kind, tmp_path).model
    sampling, ids = MergedSampling(), torch.ones(1, 3, dtype=torch.long)
    sampling.on_train_begin(None, None, None, model=model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.generate.__self__ is copied
        calls = []
        copied.get_input_embeddings().register_forward_hook(lambda *_, to=calls: to.append(1))
        copied.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2)
        assert calls
    sampling.put_back()


def test_unsupported_sampling_stops_training_before_the_first_step(tmp_path):
    sampling = MergedSampling()
    trainer = sampling_trainer("peft", tmp_path, sampling)
    trainer.model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        trainer.train()
    trainer.model.unmerge_adapter()
    trainer.args.use_transformers_continuous_batching = True
    with pytest.raises(ValueError, match="batching: MergedSampling works only with"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert "generate" not in vars(trainer.model)
