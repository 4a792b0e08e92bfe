"""The functions that a rank runs: a tiny Llama that transformers and PEFT shard over ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.distributed as dist
from models import randomize
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft_worker import ROWWISE, TARGETS, base_model, counted, error_of, trained, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import fastlora

R, SCALE, SECOND = 3, 2.0, "second"
LAYERS = 2 * len(TARGETS)


def save(folder: Path, dropout: float = 0.0, wide: int = 48, second: bool = False, **settings):
    """Write a base and an adapter with random numbers, as one process has them.

    ``wide``: the intermediate size.  ``second``: also write another adapter.  ``settings``: of the
    LoRA config.
    """
    base = base_model(num_key_value_heads=4, intermediate_size=wide)
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, config(dropout, **settings))
    if second:
        model.add_adapter(SECOND, config(dropout, **settings))
        model.base_model.set_adapter(["default", SECOND])
    randomize(model).save_pretrained(folder / "adapter")


def config(dropout: float = 0.0, **settings) -> peft.LoraConfig:
    numbers = {"r": R, "lora_alpha": R * SCALE, "lora_dropout": dropout}
    return peft.LoraConfig(target_modules=[*TARGETS], task_type="CAUSAL_LM", **numbers, **settings)


def load_base(
    folder: Path, dtype: torch.dtype = torch.float32, plan: Any = "auto", **sizes: int
) -> nn.Module:
    """The saved base, sharded over the ranks, or whole in one process."""
    settings: dict[str, Any] = {"dtype": dtype}
    if dist.is_initialized():
        sizes = {"tp_size": dist.get_world_size()} | sizes
        settings["distributed_config"] = DistributedConfig(tp_plan=plan, **sizes)
    return AutoModelForCausalLM.from_pretrained(folder / "base", **settings)


def load(folder: Path, dtype: torch.dtype = torch.float32, optimized: bool = True) -> nn.Module:
    """The saved model in training."""
    base = load_base(folder, dtype)
    model: Any = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    if (folder / "adapter" / SECOND).exists():
        model.load_adapter(folder / "adapter" / SECOND, SECOND, is_trainable=True)
        model.base_model.set_adapter(["default", SECOND])
    return fastlora.optimize(model.train()) if optimized else mended(model.train())


def mended(model: nn.Module) -> nn.Module:
    """The model with a PEFT forward that runs.

    PEFT 0.21.2 gives a rowwise lora_A the in_features of one rank.  transformers 5.24 expects the
    in_features of all ranks, and training fails in PEFT's forward with "shape '[36, 8]' is invalid
    for input of size 576".  fastlora's forward doesn't read in_features.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and isinstance(layer.weight, DTensor):
            layer.out_features, layer.in_features = layer.weight.shape
    return model


def batch() -> Tensor:
    return torch.randint(0, 100, (3, 12), generator=torch.Generator().manual_seed(5))


class Layer(NamedTuple):
    """The results of a layer's calls on one rank.  For colwise, ``y`` is its own columns."""

    y: Tensor
    dx: Tensor
    gradients: dict[str, Tensor]  # whole ones
    fast: int  # the number of fast calls


def run_layer(
    folder: Path, name: str, x: Tensor, dy: Tensor, dtype: torch.dtype, calls: int = 1
) -> Layer:
    """Call a layer on this rank's part of x, several times, without resetting its gradients."""
    layer, x, dy = part_of(folder, name, x.to(dtype), dy.to(dtype))
    torch.manual_seed(7)
    with counted() as fast:
        for _ in range(calls):
            y = layer(x)
            y.backward(dy)
    return Layer(y.detach(), x.grad, gradients_of(layer), len(fast))


def run_twice(folder: Path, name: str, x: Tensor, dy: Tensor) -> Layer:
    """Like :func:`run_layer`, with the gradients of the squares of the whole tensors' gradients."""
    layer, x, dy = part_of(folder, name, x, dy)
    wholes = [p for key, p in trained(layer) if is_whole(f"{name}.{key}")]
    with counted() as fast:
        y = layer(x)
        gradients = torch.autograd.grad(y, wholes, dy, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    return Layer(y.detach(), x.grad, gradients_of(layer), len(fast))


def part_of(folder: Path, name: str, x: Tensor, dy: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer of the second block, and this rank's parts of x and dy."""
    layer = load(folder, x.dtype).get_submodule(f"base_model.model.model.layers.1.{name}")
    size, rank = dist.get_world_size(), dist.get_rank()
    if name.endswith(ROWWISE):
        x = x.chunk(size, -1)[rank]
    else:
        dy = dy.chunk(size, -1)[rank]
    return layer, x.contiguous().requires_grad_(), dy


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in trained(model) if p.grad is not None}


class Step(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    fast: int
    coverage: fastlora.Coverage


def step(model: nn.Module, ids: Tensor | None = None) -> Step:
    """One forward and backward of a model, from the same random state."""
    ids = batch() if ids is None else ids
    torch.manual_seed(100)
    with counted() as fast:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return Step(loss.item(), gradients_of(model), len(fast), fastlora.coverage(model))


def run_step(folder: Path, optimized: bool = True, mend: bool = False) -> Step:
    """:func:`step` of the saved model.  ``mend``: layers may run PEFT's forward."""
    model = load(folder, optimized=optimized)
    return step(mended(model) if mend else model)


def run_with_own_random_states(folder: Path) -> dict[str, Tensor]:
    """The gradients of the whole tensors in a step with another random state on each rank."""
    model = load(folder)
    torch.manual_seed(dist.get_rank())
    model(input_ids=batch(), labels=batch()).loss.backward()
    return {name: p.grad for name, p in trained(model) if is_whole(name)}


def train_and_save(folder: Path, output: Path, checkpoints: bool = False) -> list[float]:
    """The losses of a few steps of a training, whose adapter is saved in the end."""
    model = load(folder)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD([p for _, p in trained(model)], lr=1.0)
    losses = []
    for _ in range(3):
        losses.append(step(model).loss)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    return losses


def check(folder: Path) -> str:
    """The text of fastlora.check in training."""
    return str(fastlora.check(mended(load(folder)), {"input_ids": batch(), "labels": batch()}))


def merge(folder: Path) -> list[str]:
    """The errors of fastlora's merge and of PEFT's."""
    model = load(folder)
    theirs = error_of(model.merge_adapter, kind=RuntimeError)
    return [error_of(fastlora.merged(model).__enter__), theirs]


def is_whole(name: str) -> bool:
    """Whether every rank has all of this tensor of an adapter."""
    return ("lora_B" in name) == any(f".{each}." in name for each in ROWWISE)


def first(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


# Changes of an optimized model's first layer, which then runs PEFT's forward.
CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "hook": lambda model: first(model).base_layer.register_forward_hook(lambda *_: None),
    "dora": lambda model: first(model).lora_variant.update(default=DoraLinearVariant()),
    "whole": lambda model: vars(first(model).lora_B["default"]).pop("forward"),
}


def report(folder: Path, change: str) -> list[str]:
    """The first layer's reason after a change, and the number of fast layers."""
    model = load(folder)
    CHANGES[change](model)
    layers = fastlora.coverage(model).layers
    return [layers[0].reason, str(sum(layer.fast for layer in layers))]


def report_of_new(folder: Path, **sizes: Any) -> fastlora.Coverage:
    """The report on a new adapter, over a base that is sharded by these settings."""
    return fastlora.coverage(fastlora.optimize(new(folder, **sizes)))


def new(folder: Path, **sizes: Any) -> nn.Module:
    return peft.get_peft_model(load_base(folder, **sizes), config())


def mixed(folder: Path) -> list[Tensor]:
    """The logits of a mixed batch by an optimized model, then by PEFT's forward."""
    model = mended(load(folder)).eval()
    with torch.no_grad():
        named = {"input_ids": batch(), "adapter_names": ["default", "__base__", "default"]}
        return [model(**named).logits, fastlora.restore(model)(**named).logits]


def compiled(folder: Path) -> list[Tensor]:
    """A layer's output by compiled and by eager calls, and whether the compiled one was fast."""
    layer = first(mended(load(folder)))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    with counted() as fast:
        y = torch.compile(layer, backend="eager")(x)
    return [y.detach(), layer(x).detach(), torch.tensor(len(fast))]
