"""Tiny models built from configs, snapshots that show changes, and counters of fast calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.layers import frozen, mlp


def tiny_llama(dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | settings)).to(dtype).eval()


class Mlp(nn.Module):
    """Two linear layers with biases, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


class Tied(nn.Module):
    """An embedding and an output layer that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)))


def randomize(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Give everything trainable random values, so that adapters change the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def adapt(model: nn.Module, std: float = 0.2, **settings) -> nn.Module:
    """PEFT's model with a LoraConfig of these settings, optimized, with random adapters."""
    from peft import LoraConfig

    return randomize(fastlora.get_peft_model(model, LoraConfig(**settings)), std)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that a failed call must leave unchanged."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    return {
        "values": {name: p.clone() for name, p in parameters.items()},
        "keys": list(model.state_dict()),
        "identities": {name: id(p) for name, p in parameters.items()},
        "trains": {name: p.requires_grad for name, p in parameters.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "merged": {name: getattr(module, "merged", None) for name, module in modules.items()},
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    now = snapshot(model)
    values, values_before = now.pop("values"), before.pop("values")
    assert values.keys() == values_before.keys()
    assert all(torch.equal(values[name], values_before[name]) for name in values)
    assert now == before


def around_values(model: nn.Module) -> list:
    """State besides values that a call may not change.

    That is classes, modes, members, hooks, requires_grad, and the random number generator's state.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    return [
        [(type(m), m.training, {*vars(m)}, len(m._forward_hooks)) for m in model.modules()],
        [(name, id(p), p.requires_grad, p.grad is None) for name, p in parameters],
        torch.get_rng_state().tolist(),
    ]


@contextmanager
def refused(model: nn.Module, message: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block raises this error and leaves the model unchanged."""
    before = snapshot(model)
    with pytest.raises(error, match=message):
        yield
    assert_untouched(model, before)


def numbers(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x and all trainable parameters, from a fixed random state."""
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.double().square().sum(), wanted)]


def assert_near(ours, theirs, tolerance: float) -> None:
    """Require a relative error (by norm) of at most ``tolerance`` for each tensor."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).double().norm() <= tolerance * other.double().norm()


def blocks(model: nn.Module) -> set[str]:
    """The names of the modules that are fast blocks (gated MLPs) now."""
    return {name for name, m in model.named_modules() if isinstance(m, mlp.GatedMLP)}


@contextmanager
def noted_calls(place: ModuleType, note: Callable) -> Iterator[None]:
    """Call ``note(module, x)`` for every fast call that the Python module ``place`` makes."""
    call = place.call_recorded

    def noted(module, x, *rest):
        # Checkpointing may end a recomputation by an exception, which also counts as a fast call.
        y = x
        try:
            y = call(module, x, *rest)
        finally:
            if y is not None:
                note(module, x)
        return y

    with mock.patch.object(place, "call_recorded", noted):
        yield


@contextmanager
def noted_blocks(note: Callable) -> Iterator[None]:
    """Call ``note(x, outputs)`` for every call of a block, with gate's, up's and down's Output."""
    with noted_calls(mlp, lambda block, x: note(x, block.read().outputs)):
        yield


@contextmanager
def counted_blocks() -> Iterator[list[Tensor]]:
    """The inputs of the calls in this context that run as one fused block."""
    calls: list[Tensor] = []
    with noted_blocks(lambda x, outputs: calls.append(x)):
        yield calls


def fast_layers(model: nn.Module) -> set[str]:
    """The names of the layers that are fastlora's frozen layers now."""
    return {name for name, m in model.named_modules() if isinstance(m, frozen.Linear)}


@contextmanager
def counted_frozen_calls() -> Iterator[list[Tensor]]:
    """The inputs of the frozen layers' fast calls in this context.

    A block's input counts once for each of its layers without an adapter.
    """
    calls: list[Tensor] = []
    run = frozen.lora_linears

    def recorded(x, *rest, **settings):
        calls.append(x)
        return run(x, *rest, **settings)

    def note(x, outputs):
        calls.extend(x for output in outputs if not output.adapters)

    with noted_blocks(note), mock.patch.object(frozen, "lora_linears", recorded):
        yield calls


class Reverse(torch.autograd.Function):
    """The identity with a reversed gradient."""

    @staticmethod
    def forward(ctx, z):
        return z * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return -gradient
