"""What a rank does in the tests on several devices."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from peft_training import (
    CPU,
    ROWWISE,
    TARGETS,
    FlatEngine,
    Record,
    Zero3Engine,
    adapter_modules,
    batch,
    blocks,
    counted,
    lora_layers,
    own_part,
    peft_model,
    train,
    trained,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from zero3 import Zero3

import fastlora
from fastlora.backends import find_backend

Wrap = Callable[[nn.Module], nn.Module]


def adapted(when: str, wrap: Wrap, kind: str = "lora", dropout: float = 0.0) -> nn.Module:
    """The wrapped model, optimised ``before`` it was wrapped, ``after`` that, or ``never``."""
    model = peft_model(kind, dropout)
    if when == "before":
        fastlora.optimize(model)
    wrapped = wrap(model)
    if when == "after":
        fastlora.optimize(wrapped)
    return wrapped


def ddp(when: str, kind: str = "lora", dropout: float = 0.0, **settings) -> Record:
    model = adapted(when, lambda model: DistributedDataParallel(model, **settings), kind, dropout)
    return train(model, [own_part()])


def ddp_checked(broken: bool) -> tuple[bool, float]:
    """The verdict of ``check`` on a model whose gradients are views of DDP's buckets.

    And how much it changed the gradients that were there.  ``broken``: with a wrong backward.
    """
    model = DistributedDataParallel(peft_model(), gradient_as_bucket_view=True)
    inputs, backend = {"input_ids": own_part(), "labels": own_part()}, find_backend(device=CPU)
    for _ in range(2):  # in the first, DDP makes the buckets once more
        model(**inputs).loss.backward()
    before = torch.cat([p.grad.flatten() for _, p in trained(model)])

    def backward(*arguments, **settings):
        return tree_map(lambda g: None if g is None else g * 1.5, original(*arguments, **settings))

    original = backend.backward
    with mock.patch.object(backend, "backward", backward) if broken else nullcontext():
        verdict = bool(fastlora.check(model, inputs))
    after = torch.cat([p.grad.flatten() for _, p in trained(model)])
    return verdict, (after - before).abs().max().item()


# What is sharded by itself, beside the decoder blocks and the model.
UNITS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "blocks": lambda model: [],
    "lora-layers": lora_layers,
    "base-layers": lambda model: [layer.base_layer for layer in lora_layers(model)],
    "adapters": adapter_modules,
}


def shard(model: nn.Module, units: str = "blocks", **settings) -> nn.Module:
    for module in (*UNITS[units](model), *blocks(model), model):
        fully_shard(module, **settings)
    return model


def fsdp2(
    when: str, units: str = "blocks", kind: str = "lora", dropout: float = 0.0, **settings
) -> Record:
    model = adapted(when, partial(shard, units=units, **settings), kind, dropout)
    return train(model, [own_part()])


def fsdp2_checkpointed(when: str, how: str, dropout: float = 0.0) -> Record:
    def wrap(model: nn.Module) -> nn.Module:
        if how == "wrapper":
            check = lambda module: isinstance(module, LlamaDecoderLayer)  # noqa: E731
            apply_activation_checkpointing(model, check_fn=check)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            model.enable_input_require_grads()
        return shard(model)

    return train(adapted(when, wrap, "lora", dropout), [own_part()])


def fsdp2_from_meta(when: str) -> Record:
    """Made, optimised and sharded without data, which is loaded last."""
    full = peft_model()
    with torch.device("meta"):
        model = adapted(when, shard)
    model.to_empty(device="cpu")
    whole_tensors = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, full.state_dict(), options=whole_tensors)
    for buffer, value in zip(model.buffers(), full.buffers(), strict=True):  # in no state dict
        buffer.copy_(value)
    return train(model, [own_part()])


def fsdp2_restored(when: str) -> tuple[int, Record, list[type]]:
    """With every LoRA layer sharded: fast calls before ``restore``, a training after it, the bases
    of a layer's class then.
    """
    model = adapted(when, partial(shard, units="lora-layers"))
    with counted() as calls:
        model(input_ids=own_part(), labels=own_part()).loss.backward()
    model.zero_grad()
    fastlora.restore(model)
    return len(calls), train(model, [own_part()]), list(type(lora_layers(model)[0]).__bases__)


def fsdp2_checked() -> str:
    """What ``check`` says, or its error."""
    ids = own_part()
    try:
        return str(fastlora.check(shard(peft_model()), {"input_ids": ids, "labels": ids}))
    except ValueError as error:
        return str(error)


def flat(model: nn.Module, units: str = "blocks") -> nn.Module:
    """Under FSDP1, its units by themselves, or by PEFT's policy what is in them, too."""
    own = ModuleWrapPolicy({LlamaDecoderLayer})
    policy = own if units == "blocks" else fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=CPU
    )


def fsdp1(when: str, units: str = "blocks") -> Record:
    return train(adapted(when, partial(flat, units=units)), [own_part()], engine=FlatEngine)


def zero3(when: str, leaves: bool = False) -> Record:
    def wrap(model: nn.Module) -> nn.Module:
        return Zero3(model, blocks(model) if leaves else ())

    return train(adapted(when, wrap), [own_part()], engine=Zero3Engine)


def torch_tensor_parallel(when: str) -> Record:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return train(adapted(when, partial(split, mesh=mesh)), [batch()])


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The projections by columns or rows, and with each that half of its adapter that can be."""
    plan = {}
    for name, parent in TARGETS.items():
        style, half = (RowwiseParallel, "A") if name in ROWWISE else (ColwiseParallel, "B")
        layer = f"base_model.model.model.layers.*.{parent}.{name}"
        plan |= {f"{layer}.base_layer": style(), f"{layer}.lora_{half}.default": style()}
    return parallelize_module(model, mesh, plan)
