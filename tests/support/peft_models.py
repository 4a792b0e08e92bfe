"""Tiny transformers models, and PEFT models in two versions: PEFT's forward, and optimized."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from models import Mlp, noted_blocks, noted_calls, randomize, tiny_llama
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fastlora
from fastlora.layers import experts_module as fast_experts
from fastlora.packing.files import CONFIG, WEIGHTS
from fastlora.peft import layer as fast_linear

VOCABULARY = 100
# Tokens that a model can learn by heart.
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
    """GPT-2: its projections are Conv1D layers; dropout in embeddings, attention and residuals."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def falcon(bias: bool = True) -> nn.Module:
    """Falcon: its linear layers compute ``x @ W.T + b`` in two steps that each round."""
    sizes = _SIZES | {"num_attention_heads": 4}
    config = transformers.FalconConfig(**sizes, bias=bias, alibi=False)
    return transformers.FalconForCausalLM(config)


def opt() -> nn.Module:
    """OPT: all its projections have biases; dropout in attention and residuals."""
    sizes = _SIZES | {"word_embed_proj_dim": 64, "ffn_dim": 96, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=32)
    return transformers.OPTForCausalLM(config)


def bert() -> nn.Module:
    """A classifier of sequences; dropout in attention and residuals."""
    sizes = _SIZES | {"intermediate_size": 96, "num_attention_heads": 4, "num_labels": 3}
    config = transformers.BertConfig(**sizes, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def adapted(base: nn.Module, adapters: tuple[str, ...] = ("default",), **settings):
    """``base`` with PEFT adapters, all of them active, in evaluation mode.

    Trainable parameters are randomized: PEFT initializes B to zero, which would hide a wrong
    result.
    """
    config = {"r": 4, "lora_alpha": 6} | settings
    model = peft.get_peft_model(base, peft.LoraConfig(**config), adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, peft.LoraConfig(**config))
    if len(adapters) > 1:
        model.base_model.set_adapter(list(adapters))
    return randomize(model, std=0.1).eval()


KINDS = {"lora": {}, "dora": {"use_dora": True}}

# The tolerance for ``mlp`` in float64: sums of 12 terms, each rounded at 1e-16, and nothing else.
ROUNDING = 1e-13


def mlp(**settings) -> peft.PeftModel:
    return adapted(Mlp(), **{"target_modules": ["up", "down"]} | settings).double()


def inputs() -> torch.Tensor:
    """x [3, 5, 8], the same in every call."""
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def up(model: nn.Module) -> lora.Linear:
    return model.get_submodule("base_model.model.up")


def gradients(model: nn.Module, **named) -> dict[str, torch.Tensor]:
    """The gradients of x and of all trainable parameters, from a fixed random state."""
    torch.manual_seed(3)
    x = inputs().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(x, **named).square().sum()
    found = torch.autograd.grad(loss, [x, *trained.values()])
    return dict(zip(["x", *trained], found, strict=True))


def other_config(**settings) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ["up", "down"], "r": 3} | settings)


def write_adapter(folder: Path, **settings) -> Path:
    """Write the files of an adapter for a float64 Mlp."""
    return save(mlp(**settings), folder)


def save(model: peft.PeftModel, folder: Path) -> Path:
    """Write an adapter's files without README.md, which would take a third of the time."""
    model.create_or_update_model_card = lambda folder: None
    model.save_pretrained(folder)
    return folder


def optimized(model: nn.Module) -> nn.Module:
    """An optimized copy of the model."""
    model = copy.deepcopy(model)
    fastlora.optimize(model)
    return model


@contextmanager
def counted_calls() -> Iterator[list[Tensor]]:
    """The inputs of the fast calls of LoRA layers in this context.

    The input of a fused block, or of experts, counts once for each of its layers with adapters.
    """
    calls: list[Tensor] = []
    run_experts: Callable = fast_experts.lora_experts

    def recorded_experts(x, index, weights, up, down, *rest, **named):
        calls.extend(x for output in (up, down) if output.adapters)
        return run_experts(x, index, weights, up, down, *rest, **named)

    def note(x, outputs):
        calls.extend(x for output in outputs if output.adapters)

    of_layers = noted_calls(fast_linear, lambda layer, x: calls.append(x))
    of_experts = mock.patch.object(fast_experts, "lora_experts", recorded_experts)
    with of_layers, of_experts, noted_blocks(note):
        yield calls


def run_both(
    run: Callable[[nn.Module], Any], theirs: nn.Module, ours: nn.Module | None = None
) -> tuple[Any, Any, list[Tensor]]:
    """``run`` on an optimized copy and on PEFT's model: both results, and the copy's fast calls.

    Both start from the same random state.  ``ours`` replaces the optimized copy.
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
    """Check that the results of :func:`run_both` agree, with ``fast`` fast calls; return ours."""
    got, expected, calls = run_both(run, theirs, ours)
    assert len(calls) == fast
    assert_same(got, expected, tolerance)
    return got


@contextmanager
def counted_ops() -> Iterator[dict[str, int]]:
    """How often compiled code in this context calls fastlora's registered ops.

    Eager calls don't use them.  Calls during compilation also count.
    """
    ops: dict[str, int] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield ops
    for event in profile.key_averages():
        if event.key.startswith("fastlora::"):
            ops[event.key.removeprefix("fastlora::")] = event.count


def assert_same(ours, theirs, tolerance: float) -> None:
    """Compare two trees of equal structure: floating tensors up to the tolerance, others exactly.

    The tolerance is relative to the largest element of each tensor; NaN equals NaN.
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
    """Write an adapter made by PEFT into the folder."""
    torch.manual_seed(4)
    theirs = peft.get_peft_model(model or llama(), peft.LoraConfig(**settings))
    return save(randomize(theirs), folder)


def changes(folder, base=llama) -> dict[str, torch.Tensor]:
    """The changes that PEFT's merge makes to each weight, in float64."""
    model = base().double()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    found = {name: merged[name] - plain[name] for name in plain}
    return {name: change for name, change in found.items() if change.any()}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_changes(found: dict, wanted: dict, tolerance: float = 1e-6) -> None:
    """Compare the results of two calls of :func:`changes`."""
    assert found.keys() == wanted.keys()
    assert all(relative(found[name], wanted[name]) < tolerance for name in wanted)


def cut(whole: torch.Tensor, r: int) -> torch.Tensor:
    """The nearest matrix of rank r to each matrix, by the dense SVD."""
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    return (left[..., :r] * values[..., None, :r]) @ right[..., :r, :]


def change_config(folder, **settings):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
