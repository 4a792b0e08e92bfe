"""transformers' Trainer on optimized models, and MergedSampling.

The models are tiny Llamas with dropout in the adapters.  "The same" means bit-equal.
"""

import functools
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import adapt
from peft_models import assert_same
from torch import nn
from trainer_runs import (
    ADAPTER,
    KINDS,
    STEPS,
    VOCABULARY,
    adapted,
    base_model,
    frozen_bits,
    result,
    stopped_and_resumed,
    train_in_ranks,
    trainer_for,
)
from transformers import Trainer

import fastlora
from fastlora.trainer import MergedSampling

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


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
def test_offloaded_checkpoints_change_no_bit(tmp_path, monkeypatch):
    stores, store = [], transformers.modeling_utils.save_on_cpu
    monkeypatch.setattr(
        transformers.modeling_utils,
        "save_on_cpu",
        lambda **settings: stores.append(settings) or store(),
    )

    def run(name: str, **settings) -> dict[str, Any]:
        trainer = trainer_for(adapted(loss=True), tmp_path / name, **settings)
        trainer.train()
        return result(trainer)

    expected = run("plain")
    assert not stores
    settings = {"gradient_checkpointing_kwargs": {"offload": True}}
    assert_same(run("offload", gradient_checkpointing=True, **settings), expected, 0.0)
    assert len(stores) == 2 * STEPS  # each of the two blocks in each step


@pytest.mark.parametrize("name", ["mixtral", "nemotron"])
def test_a_resumed_mixture_is_the_run_without_a_stop(name, tmp_path):
    """transformers saves Mixtral's experts, and all of Nemotron, under other names."""
    moe_models = pytest.importorskip("moe_models")

    def mixture(seed):
        torch.manual_seed(1)
        model = moe_models.base_model(name, vocab_size=VOCABULARY)
        targets = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        targets |= {"target_parameters": moe_models.parameters_of(name)}
        torch.manual_seed(seed)
        return adapt(model, 0.1, r=2, **targets)

    assert_same(*map(result, stopped_and_resumed(mixture, tmp_path)), 0.0)


def test_in_ddp_one_rank_writes_and_a_resumed_run_is_the_run_without_a_stop(two, tmp_path):
    expected = two.run(train_in_ranks, str(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}")
    resumed = two.run(train_in_ranks, str(tmp_path / "resumed"), checkpoint)
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
    model = peft.get_peft_model(base_model(), config)
    if kind == "optimized":
        fastlora.optimize(model)
    trainer = trainer_for(model, folder)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize(("kind", "keep"), [("peft", "device"), ("optimized", "cpu")])
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


@pytest.mark.parametrize("somebody_s", [False, True])
def test_two_callbacks_on_one_model_restore_its_method(somebody_s, tmp_path):
    model = sampling_trainer("peft", tmp_path).model
    before = model.generate
    if somebody_s:
        vars(model)["generate"] = before
    bits = frozen_bits(model)
    first, second = begin(model), begin(model)
    for sampling in (second, first):
        assert is_sampled_merged(model)
        sampling.on_train_end(None, None, None)
    assert not is_sampled_merged(model)
    assert (vars(model).get("generate") is before) == somebody_s
    assert all(map(torch.equal, frozen_bits(model), bits))


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
