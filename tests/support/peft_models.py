"""Tiny transformers models, and PEFT models twice: as PEFT has them, and optimized."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import Mlp, noted_blocks, noted_calls, randomize, tiny_llama
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fastlora
from fastlora.layers import experts as fast_experts
from fastlora.model.files import CONFIG, WEIGHTS
from fastlora.peft import layer as fast_linear

VOCABULARY = 100
# Tokens to learn by heart.
BATCH = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(5))
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def qwen3(**settings) -> nn.Module:
    sizes = _SIZES | _HEADS | {"intermediate_size": 96} | settings
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))


def gemma3() -> nn.Module:
    sizes = _SIZES | _HEADS | {"intermediate_size": 96}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))


def gpt2() -> nn.Module:
    """Its projections are Conv1D layers; it drops in embeddings, attention and residuals."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def falcon(bias: bool = True) -> nn.Module:
    """Its linear layers compute x @ W.T + b, each with a rounding of its own."""
    sizes = _SIZES | {"num_attention_heads": 4}
    config = transformers.FalconConfig(**sizes, bias=bias, alibi=False)
    return transformers.FalconForCausalLM(config)


def opt() -> nn.Module:
    """All its projections have biases; it drops in attention and residuals."""
    sizes = _SIZES | {"word_embed_proj_dim": 64, "ffn_dim": 96, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=32)
    return transformers.OPTForCausalLM(config)


def bert() -> nn.Module:
    """A classifier of sequences; it drops in attention and residuals."""
    sizes = _SIZES | {"intermediate_size": 96, "num_attention_heads": 4, "num_labels": 3}
    config = transformers.BertConfig(**sizes, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def adapted(base: nn.Module, adapters: tuple[str, ...] = ("default",), **settings):
    """``base`` with PEFT adapters, all of them active, in evaluation.

    What trains is noisy: PEFT starts B at zero, where a wrong path could hide.
    """
    config = {"r": 4, "lora_alpha": 6} | settings
    model = peft.get_peft_model(base, peft.LoraConfig(**config), adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, peft.LoraConfig(**config))
    if len(adapters) > 1:
        model.base_model.set_adapter(list(adapters))
    return randomize(model, std=0.1).eval()


KINDS = {"lora": {}, "dora": {"use_dora": True}}

# For the Mlp below, in float64, where all that isn't rounding shows: sums of 12 terms, rounded at
# 1e-16 each.
ROUNDING = 1e-13


def mlp(**settings) -> peft.PeftModel:
    return adapted(Mlp(), **{"target_modules": ["up", "down"]} | settings).double()


def inputs() -> torch.Tensor:
    """[3, 5, 8], the same in every call."""
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def up(model: nn.Module) -> lora.Linear:
    return model.get_submodule("base_model.model.up")


def gradients(model: nn.Module, **named) -> dict[str, torch.Tensor]:
    """The gradients of x and of all that trains, from the same random state each time."""
    torch.manual_seed(3)
    x = inputs().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(x, **named).square().sum()
    found = torch.autograd.grad(loss, [x, *trained.values()])
    return dict(zip(["x", *trained], found, strict=True))


def other_config(**settings) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ["up", "down"], "r": 3} | settings)


def write_adapter(folder: Path, **settings) -> Path:
    """The files of an adapter for an Mlp of float64."""
    mlp(**settings).save_pretrained(folder)
    return folder


def optimized(model: nn.Module) -> nn.Module:
    """A copy of the model, optimized."""
    model = copy.deepcopy(model)
    fastlora.optimize(model)
    return model


@contextmanager
def counted_calls() -> Iterator[list[Tensor]]:
    """The inputs of the eager calls of LoRA layers that run fast inside.

    The input of a block, and of experts, counts for each of its layers that has adapters.
    """
    calls: list[Tensor] = []
    run_experts: Callable = fast_experts.lora_experts

    def recorded_experts(x, index, weights, up, down, *rest, **named):
        calls.extend(x for output in (up, down) if output.adapters)
        return run_experts(x, index, weights, up, down, *rest, **named)

    def note(x, outputs):
        calls.extend(x for output in outputs if output.adapters)

    of_layers = noted_calls(fast_linear, lambda layer, x: calls.append(x))
    with pytest.MonkeyPatch.context() as patch, noted_blocks(note), of_layers:
        patch.setattr(fast_experts, "lora_experts", recorded_experts)
        yield calls


def run_both(
    run: Callable[[nn.Module], Any], theirs: nn.Module, ours: nn.Module | None = None
) -> tuple[Any, Any, list[Tensor]]:
    """What ``run`` gives for an optimized copy and for PEFT's model, and the copy's fast calls.

    From the same random state.  ``ours`` is another model than such a copy.
    """
    ours = optimized(theirs) if ours is None else ours
    with counted_calls() as calls:
        torch.manual_seed(5)
        expected = run(theirs)
        assert not calls
        torch.manual_seed(5)
        return run(ours), expected, calls


def assert_runs_the_same(
    run: Callable[[nn.Module], Any],
    theirs: nn.Module,
    ours: nn.Module | None = None,
    *,
    fast: int,
    tolerance: float,
) -> Any:
    """:func:`run_both` gives the same, with so many fast calls; returns it."""
    got, expected, calls = run_both(run, theirs, ours)
    assert len(calls) == fast
    assert_same(got, expected, tolerance)
    return got


@contextmanager
def counted_ops() -> Iterator[dict[str, int]]:
    """How often fastlora's ops are called inside by compiled code (eager mode doesn't call them).

    While it compiles they are called too.
    """
    ops: dict[str, int] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield ops
    for event in profile.key_averages():
        if event.key.startswith("fastlora::"):
            ops[event.key.removeprefix("fastlora::")] = event.count


def assert_same(ours, theirs, tolerance: float) -> None:
    """Two trees of the same form, floating tensors equal up to the tolerance, all else exactly.

    The tolerance is relative to the largest element of a tensor; a NaN equals a NaN.
    """
    our_leaves, our_form = tree_flatten(ours)
    their_leaves, their_form = tree_flatten(theirs)
    assert our_form == their_form
    for our, their in zip(our_leaves, their_leaves, strict=True):
        if isinstance(their, Tensor) and their.is_floating_point():
            assert (our.dtype, our.shape) == (their.dtype, their.shape)
            finite = their.detach()[their.isfinite()]
            size = finite.abs().max().item() if len(finite) else 0.0
            torch.testing.assert_close(our, their, rtol=0, atol=tolerance * size, equal_nan=True)
        elif isinstance(their, Tensor):
            assert torch.equal(our, their)
        else:
            assert our == their


def llama() -> torch.nn.Module:
    torch.manual_seed(3)
    return tiny_llama()


def by_peft(folder, model=None, **settings):
    """An adapter of PEFT's in the folder."""
    torch.manual_seed(4)
    theirs = peft.get_peft_model(model or llama(), peft.LoraConfig(**settings))
    randomize(theirs).save_pretrained(folder)
    return folder


def changes(folder, base=llama) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight, in float64."""
    model = base().double()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    found = {name: merged[name] - plain[name] for name in plain}
    return {name: change for name, change in found.items() if change.any()}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def cut(whole: torch.Tensor, r: int) -> torch.Tensor:
    """The nearest of this rank, by the dense SVD; of each matrix."""
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    return (left[..., :r] * values[..., None, :r]) @ right[..., :r, :]


def change_config(folder, **settings):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
