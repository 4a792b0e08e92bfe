"""Tiny transformers models train as they do with PEFT: the same losses, gradients and adapters.

Both runs have the same dropout masks in the adapters (``shared_masks``), and the same random state
for the models' own dropout.  All is in float64, where all that isn't rounding shows.
"""

from functools import partial

import pytest
import torch
import transformers
from models import counted_blocks, tiny_llama
from peft_llama import ROUNDING, adamw, gradients, train
from peft_models import (
    BATCH,
    adapted,
    assert_runs_the_same,
    assert_same,
    bert,
    falcon,
    gemma3,
    gpt2,
    opt,
    optimized,
    qwen3,
)
from torch import Tensor, nn

import fastlora


def mistral() -> nn.Module:
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, **heads))


# A bias of k_proj has no gradient but rounding, since softmax takes it away.
BIASED = {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]}
MODELS = {  # what makes it, the adapters' settings, and how many of its gated MLPs are blocks
    "llama": (tiny_llama, {}, 2),
    "qwen3": (qwen3, {"use_rslora": True}, 2),
    "gemma3": (gemma3, {}, 2),
    "mistral": (mistral, {}, 2),
    "falcon": (falcon, {}, 0),
    "gpt2": (gpt2, {"fan_in_fan_out": True}, 0),
    "opt-two-lora_bias": (opt, BIASED | {"adapters": ("one", "two"), "lora_bias": True}, 0),
    "opt-dora-trained-bias": (opt, BIASED | {"use_dora": True, "bias": "lora_only"}, 0),
    "bert": (bert, {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}, 0),
    "patterns": (
        tiny_llama,
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 12},
            "alpha_pattern": {"v_proj": 1, "up_proj": 32},
        },
        2,
    ),
    "frozen-lora_A": (tiny_llama, {}, 2),
}


def data_for(model: nn.Module) -> dict[str, Tensor]:
    is_classifier = "Classification" in type(model.base_model.model).__name__
    return {"input_ids": BATCH, "labels": torch.tensor([0, 1, 2, 1]) if is_classifier else BATCH}


@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_five_steps_are_peft_s(name):
    make, settings, blocks = MODELS[name]
    settings = {"target_modules": "all-linear", "lora_dropout": 0.1} | settings
    theirs = adapted(make(), **settings).double()
    if name == "frozen-lora_A":
        for parameter_name, parameter in theirs.named_parameters():
            parameter.requires_grad_("lora_B" in parameter_name)
    ours, data = optimized(theirs), data_for(theirs)
    report = fastlora.coverage(ours)
    assert not report.eager, report
    run = partial(gradients, data=data)
    with counted_blocks() as calls:
        assert_runs_the_same(run, theirs, ours, fast=len(report.fast), tolerance=ROUNDING)
    assert len(calls) == blocks
    # With its own eps AdamW makes steps of one size even of gradients that are all rounding.
    steps = partial(train, make=partial(adamw, eps=1e-5), steps=5, data=data)
    assert_same(steps(ours), steps(theirs), 10 * ROUNDING)


def test_what_isn_t_covered_stays_peft_s_beside_the_rest():
    """An embedding; and a tied head with trained tokens, whose base PEFT wraps."""
    settings = {"trainable_token_indices": [5, 6], "target_modules": ["q_proj", "lm_head"]}
    report = fastlora.optimize(adapted(qwen3(tie_word_embeddings=True), **settings))
    assert (len(report.fast), [layer.reason for layer in report.eager]) == (
        2,
        ["its base is a TrainableTokensWrapper, no torch.nn.Linear"],
    )
    theirs = adapted(tiny_llama(), target_modules=["embed_tokens", "q_proj"]).double()
    assert_runs_the_same(gradients, theirs, fast=2, tolerance=ROUNDING)
