"""A training of a tiny adapted Llama, under any engine, and a record of all that it computed."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import peft
import torch
import torch.distributed as dist
from models import randomise, tiny_llama
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import fastlora
from fastlora.backends import find_backend
from fastlora.peft.masks import shared_masks
from fastlora.report import LayerCoverage

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TARGETS = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
ROWWISE = ("o_proj", "down_proj")
LAYERS, STEPS, LEARNING_RATE = 2 * len(TARGETS), 3, 1.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Record:
    """What a training computed; tensors by their names in the unwrapped model, whole."""

    losses: list[float]
    gradients: dict[str, Tensor]  # of the first step
    adapter: dict[str, Tensor]  # after the last
    fast: int  # how many outputs of the fast op were made
    inside: fastlora.Coverage  # as the layers are in the forward of what contains them
    coverage: fastlora.Coverage  # afterwards, between calls
    external: frozenset[str] = frozenset()  # parameters that ZeRO-3 saw read outside of their calls


def base_model() -> nn.Module:
    """The same model, with the same weights, in every process."""
    torch.manual_seed(1)
    model = tiny_llama(hidden_size=32, intermediate_size=48, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def peft_model(kind: str = "lora", dropout: float = 0.0) -> nn.Module:
    """Adapted layers of one kind, with the same weights in every process."""
    base = base_model()
    torch.manual_seed(2)
    settings = {"target_modules": list(TARGETS), "lora_dropout": dropout}
    kinds = {"use_dora": kind == "dora", "lora_bias": kind == "lora-bias"}
    config = peft.LoraConfig(r=4, lora_alpha=8, **kinds, **settings)
    model = peft.get_peft_model(base, config)
    if kind == "two-adapters":
        model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, **settings))
        model.base_model.set_adapter(["default", "second"])
    return randomise(model).train()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's, of a PEFT model or a plain one."""
    return model.get_decoder().layers


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    halves = [half for layer in lora_layers(model) for half in (layer.lora_A, layer.lora_B)]
    return [part for half in halves for part in half.values()]


def batch() -> Tensor:
    return torch.randint(0, 100, (4, 12), generator=torch.Generator().manual_seed(5))


def own_part() -> Tensor:
    """This rank's rows of the batch."""
    return batch().chunk(dist.get_world_size())[dist.get_rank()]


class Engine:
    """How a model's steps are taken, and its tensors made whole: a model under plain SGD.

    Momentum or Adam would show nothing more, and make a rounding error of a small gradient large.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def gradients(self) -> dict[str, Tensor]:
        return {name: whole(p.grad) for name, p in trained(self.model) if p.grad is not None}

    def adapter(self) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in trained(self.model)}

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class FlatEngine(Engine):
    """FSDP1's parameters are parts of flat ones."""

    def gradients(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
            return super().gradients()

    def adapter(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.model):
            return super().adapter()


class Zero3Engine(Engine):
    def gradients(self) -> dict[str, Tensor]:
        return {name: self.model.gradient(p).clone() for name, p in trained(self.model)}

    def adapter(self) -> dict[str, Tensor]:
        return {name: self.model.whole(p) for name, p in trained(self.model)}

    def step(self) -> None:
        self.model.step(LEARNING_RATE)


def train(
    model: nn.Module, parts: list[Tensor], engine: Callable[[nn.Module], Engine] = Engine
) -> Record:
    """A few steps on the mean over ``parts``, each of which sees the same random state."""
    engine = engine(model)
    losses, gradients = [], {}
    with counted() as calls, covered(model) as inside:
        for _ in range(STEPS):
            total = 0.0
            for ids in parts:
                torch.manual_seed(100)
                loss = model(input_ids=ids, labels=ids).loss / len(parts)
                loss.backward()
                total += loss.item()
            losses.append(total)
            gradients = gradients or engine.gradients()
            engine.step()
    external = frozenset(getattr(model, "external", ()))
    coverages = fastlora.Coverage(tuple(inside.values())), fastlora.coverage(model)
    return Record(losses, gradients, engine.adapter(), len(calls), *coverages, external)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train, by their names without those of wrappers."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield re.sub(r"^module\.|_(checkpoint|fsdp)_wrapped_module\.", "", name), parameter


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@contextmanager
def counted() -> Iterator[list[None]]:
    """One element more for each output of a call of the fast op."""
    calls, backend = [], find_backend(device=CPU)

    def forward(inputs, seeds, settings):
        calls.extend([None] * len(settings.layouts))
        return original(inputs, seeds, settings)

    original = backend.forward
    with mock.patch.object(backend, "forward", forward):
        yield calls


@contextmanager
def covered(model: nn.Module) -> Iterator[dict[str, LayerCoverage]]:
    """What coverage says of every layer while the module that contains it runs."""
    found = {}

    def look(name: str, module: nn.Module, _) -> None:
        if not torch.compiler.is_compiling():
            for layer in fastlora.coverage(module).layers:
                found[f"{name}.{layer.name}"] = layer

    parents = ((n, m) for n, m in model.named_modules() if isinstance(m, LlamaAttention | LlamaMLP))
    hooks = [m.register_forward_pre_hook(partial(look, name)) for name, m in parents]
    yield found
    for hook in hooks:
        hook.remove()


def alone(parts: int = 1, kind: str = "lora", dropout: float = 0.0) -> Record:
    """PEFT as it is, in one process, on the whole batch, in one go or in equal parts."""
    model = peft_model(kind, dropout)
    with shared_masks(model):
        return train(model, list(batch().chunk(parts)))
