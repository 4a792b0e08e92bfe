"""Tiny transformers models train as with PEFT: the same losses, gradients and adapters.

Both runs use the same dropout masks in the adapters (``shared_masks``), and the same random state
for the models' own dropout.  Computation is in float64, so that any error beyond rounding shows.
Tests of torch's optimizers and checkpointing, and of accelerate, follow.
"""

import copy
from functools import partial

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from judge import saved_bytes
from models import counted_blocks, tiny_llama
from peft_llama import (
    DATA,
    LAYERS,
    NOT_REENTRANT,
    REENTRANT,
    ROUNDING,
    adamw,
    gradients,
    llama,
    logits,
    train,
    trained,
)
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
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fastlora
from fastlora.peft.baseline import shared_masks

# k_proj's bias cancels in the softmax, so its gradient would be rounding only.
BIASED = {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]}
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 12},
    "alpha_pattern": {"v_proj": 1, "up_proj": 32},
}
MODELS = {  # Values: the model, the adapters' settings, and how many gated MLPs run as blocks
    "llama": (tiny_llama, {}, 2),
    "qwen3": (qwen3, {"use_rslora": True}, 2),
    "gemma3": (gemma3, {}, 2),
    "falcon": (falcon, {}, 0),
    "gpt2": (gpt2, {"fan_in_fan_out": True}, 0),
    "opt-two-lora_bias": (opt, BIASED | {"adapters": ("one", "two"), "lora_bias": True}, 0),
    "opt-dora-trained-bias": (opt, BIASED | {"use_dora": True, "bias": "lora_only"}, 0),
    "bert": (bert, {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}, 0),
    "patterns": (tiny_llama, PATTERNS, 2),
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
    assert not report.not_fast, report
    run = partial(gradients, data=data)
    with counted_blocks() as calls:
        assert_runs_the_same(run, theirs, ours, fast=len(report.fast), tolerance=ROUNDING)
    assert len(calls) == blocks
    # With AdamW's default eps, even gradients that are all rounding make full-size steps.
    steps = partial(train, make=partial(adamw, eps=1e-5), steps=5, data=data)
    assert_same(steps(ours), steps(theirs), 10 * ROUNDING)


def test_what_isn_t_covered_stays_peft_s_beside_the_rest():
    """An embedding; and a tied head with trained tokens, whose base PEFT wraps."""
    settings = {"trainable_token_indices": [5, 6], "target_modules": ["q_proj", "lm_head"]}
    model = adapted(qwen3(tie_word_embeddings=True), **settings)
    report = fastlora.coverage(fastlora.optimize(model))
    (layer,) = report.not_fast
    assert layer.reason == "its base is a TrainableTokensWrapper, no torch.nn.Linear"
    assert len(report.fast) == 2
    theirs = adapted(tiny_llama(), target_modules=["embed_tokens", "q_proj"]).double()
    assert_runs_the_same(gradients, theirs, fast=2, tolerance=ROUNDING)


# Saves the output of attention, as TRL's selective checkpointing does.
SELECTIVE = {
    "use_reentrant": False,
    "context_fn": partial(
        create_selective_checkpoint_contexts,
        [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default],
    ),
}
CHECKPOINTING = {"reentrant": REENTRANT, "not-reentrant": NOT_REENTRANT, "selective": SELECTIVE}


def kept(model: nn.Module) -> int:
    """Bytes saved for the backward of the training loss, without parameters."""
    return sum(saved_bytes(lambda: model.train()(**DATA).loss, model.parameters()).values())


@pytest.mark.parametrize("how", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_blocks_run_fast_twice_and_keep_less(how):
    theirs = llama(use_dora=how is REENTRANT)
    ours, plain = optimized(theirs), optimized(theirs)
    for model in (theirs, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    got = assert_runs_the_same(gradients, theirs, ours, fast=2 * LAYERS, tolerance=ROUNDING)
    assert_same(got, gradients(plain), 0.0)  # the same masks in the recomputation
    assert kept(ours) < 0.5 * kept(plain)
    assert kept(ours) == kept(theirs)


def test_an_optimizer_s_step_inside_of_backward():
    """Parameters change while layers below still wait for their backward."""

    def run(model):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in trained(model).values()}

        def step(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(step)
        torch.manual_seed(7)
        with shared_masks(model.train()):
            for _ in range(3):
                model(**DATA).loss.backward()
        return {name: p.detach() for name, p in trained(model).items()}

    assert_runs_the_same(run, llama(), fast=3 * LAYERS, tolerance=ROUNDING)


def base_layers(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.endswith(".base_layer")]


@pytest.fixture(params=["optimized", "hooked"])
def both(request):
    """PEFT's model, and a copy that is optimized before or after it gets hooks."""
    theirs = llama()
    return theirs, optimized(theirs) if request.param == "optimized" else copy.deepcopy(theirs)


@pytest.mark.parametrize("moved", ["inputs", "outputs"])
def test_hooks_of_accelerate_on_base_layers(moved, both):
    """A hook that moves inputs leaves the layer fast; a hook that moves outputs doesn't."""
    theirs, ours = both
    for layer in base_layers(ours):
        hook = AlignDevicesHook(execution_device="cpu", io_same_device=moved == "outputs")
        add_hook_to_module(layer, hook)
    fastlora.optimize(ours)
    fast = LAYERS * (moved == "inputs")
    assert_runs_the_same(gradients, theirs, ours, fast=fast, tolerance=ROUNDING)
    for layer in base_layers(ours):  # then the reverse
        layer._hf_hook.io_same_device = moved != "outputs"
    assert_runs_the_same(gradients, theirs, ours, fast=LAYERS - fast, tolerance=ROUNDING)


def test_of_a_dispatched_model_only_offloaded_layers_are_peft_s(both, tmp_path):
    theirs, ours = both
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places = {f"base_model.model.{part}": "cpu" for part in parts}
    places["base_model.model.model.layers.1"] = "disk"
    accelerate.dispatch_model(ours, places, offload_dir=str(tmp_path))
    report = fastlora.coverage(fastlora.optimize(ours))
    assert all(".layers.0." in layer.name for layer in report.fast)
    assert all(".layers.1." in layer.name for layer in report.not_fast)
    assert len(report.fast) == LAYERS // 2
    assert_runs_the_same(logits, theirs, ours, fast=LAYERS // 2, tolerance=ROUNDING)
