"""Functions that a rank runs: reports and files under FSDP, many adapters, QLoRA."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import peft
import peft_worker as training
import torch
import torch.distributed as dist
from models import Mlp, adapt, counted_blocks, randomize, tiny_llama
from moe_models import IDS, base_model, parameters_of
from peft_worker import Zero3, error_of, flat, shard, split
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from vendor_layers import quantized

import fastlora
from fastlora.layers.mlp import PARTS


def step(model: nn.Module) -> None:
    ids = training.batch()
    model(input_ids=ids, labels=ids).loss.backward()


def reports(kind: str) -> list[fastlora.Coverage]:
    """Two reports of a PEFT model under FSDP1: optimize's, and coverage's after a fast step."""
    model = flat(training.peft_model(kind))
    first = fastlora.coverage(fastlora.optimize(model, strict=True))
    with training.counted() as calls:
        step(model)
    assert len(calls) == training.LAYERS
    first = fastlora.Coverage(first.layers, first.notes, gated_mlps=first.gated_mlps)
    return [first, fastlora.coverage(model)]


def report_by_peft_s_policy() -> str:
    return str(fastlora.coverage(fastlora.optimize(flat(training.peft_model(), "adapters"))))


LATE = peft.LoraConfig(r=2, target_modules=["q_proj"])


def attached_last(wrap: Callable[..., nn.Module], **group: Any) -> nn.Module:
    """An adapter in a model that is wrapped already; ``group``: the ranks, if not all."""
    wrapped = wrap(tiny_llama(), **group)
    peft.inject_adapter_in_model(LATE, getattr(wrapped, "module", wrapped))
    return wrapped


def one_more(model: nn.Module) -> nn.Module:
    """Shard a model that already has an adapter, then add a second adapter."""
    shard(model).add_adapter("second", LATE)
    model.set_adapter("second")
    return model


def with_head() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    return peft.get_peft_model(tiny_llama(), config)


def head_left_over() -> nn.Module:
    """A model whose blocks are sharded, but not the modules around them."""
    model = with_head()
    for block in training.blocks(model):
        fully_shard(block)
    return model


# Models with trainable parameters that no wrapper synchronizes; the notes must name them.
LEFT_OUT = {
    "fsdp2": lambda: attached_last(shard),
    "fsdp2-second-adapter": lambda: one_more(training.peft_model()),
    "fsdp2-head": head_left_over,
    "fsdp1": lambda: attached_last(flat),
    "ddp": lambda: attached_last(DistributedDataParallel),
    "zero3": lambda: attached_last(Zero3),
}


def called(model: nn.Module) -> nn.Module:
    """The model after a call without backward: FSDP2 leaves the root's parameters unsharded."""
    with torch.no_grad():
        model(input_ids=training.batch())
    return model


def with_own_sync(model: nn.Module) -> nn.Module:
    """Adapters that FSDP2 is told to ignore; a hook averages their gradients."""
    adapters = {p for p in model.parameters() if p.requires_grad}
    for parameter in adapters:
        parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    return shard(model, ignored_params=adapters)


def ignored_by_fsdp1(model: nn.Module) -> nn.Module:
    adapters = [p for p in model.parameters() if p.requires_grad]
    settings = {"use_orig_params": True, "device_id": training.CPU}
    return FullyShardedDataParallel(model, ignored_states=adapters, **settings)


def ignored_by_ddp(model: nn.Module) -> nn.Module:
    names = [name for name, p in model.named_parameters() if "q_proj.lora_" in name]
    model._ddp_params_and_buffers_to_ignore = names
    return DistributedDataParallel(model)


def of_one_rank() -> Any:
    """A process group of this rank only.  All ranks must create all groups in the same order."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    return groups[dist.get_rank()]


# Models without such parameters.
TAKEN = {
    "fsdp2": lambda: shard(training.peft_model()),
    "fsdp2-after-a-call": lambda: called(shard(with_head())),
    "fsdp2-frozen": lambda: attached_last(shard).requires_grad_(False),
    "fsdp2-own-sync": lambda: with_own_sync(training.peft_model()),
    "fsdp2-one-rank": lambda: attached_last(
        shard, mesh=DeviceMesh.from_group(of_one_rank(), "cpu")
    ),
    "fsdp1": lambda: flat(training.peft_model()),
    "fsdp1-by-peft-s-policy": lambda: flat(training.peft_model(), "adapters"),
    "fsdp1-told-to-ignore": lambda: ignored_by_fsdp1(training.peft_model()),
    "ddp": lambda: DistributedDataParallel(training.peft_model()),
    "ddp-told-to-ignore": lambda: ignored_by_ddp(training.peft_model()),
    "ddp-one-rank": lambda: attached_last(DistributedDataParallel, process_group=of_one_rank()),
    "zero3": lambda: Zero3(training.peft_model()),
    "tensor-parallel": lambda: split(
        training.peft_model(), init_device_mesh("cpu", (dist.get_world_size(),))
    ),
    "no-wrapper": training.peft_model,
}


def notes(kind: str, table: str) -> list[str]:
    """Notes on parameters that are not synchronized, from optimize, coverage and check."""
    model = {"left out": LEFT_OUT, "taken": TAKEN}[table][kind]()
    reports = fastlora.coverage(fastlora.optimize(model)), fastlora.coverage(model)
    ids = training.batch()
    # check raises an error if no layer is fast, for example under ZeRO-3
    checked = error_of(fastlora.check, model, {"input_ids": ids, "labels": ids})
    return [*("\n".join(report.notes) for report in reports), checked]


Found = dict[str, Tensor | None]
# One rank's half has no sample of "s", the other's none of "q".  No sample uses "t".
NAMES = ["p", "q", "__base__", "p", "s", "p", "s", "s"]
ALL = ["p", "q", "s", "t"]


def gradients(model: nn.Module) -> Found:
    """The unsharded gradients of all trainable parameters, by the unwrapped model's names."""
    return {
        name: None if parameter.grad is None else training.whole(parameter.grad)
        for name, parameter in training.trained(model)
    }


def own(values: Any, ranks: int) -> Any:
    """This rank's part of a batch; the whole batch if there is one process."""
    if ranks == 1:
        return values
    size, rank = len(values) // ranks, dist.get_rank()
    return values[size * rank : size * (rank + 1)]


def train(model: nn.Module, ranks: int, settings: dict, *inputs: Any, **options: Any) -> Found:
    """Two steps without an optimizer, because DDP orders its buckets anew before the second one."""
    running = DistributedDataParallel(model, **settings) if ranks > 1 else model
    for _ in range(2):
        model.zero_grad()
        running(*inputs, **options).square().mean().backward()
    return gradients(model)


def mixed_peft(ranks: int, names: Sequence[str] = NAMES, **settings) -> Found:
    """An optimized PEFT model called with ``adapter_names``."""
    torch.manual_seed(0)
    model = Mlp()
    for i, name in enumerate(ALL):
        config = peft.LoraConfig(r=2 + i, target_modules=["up", "down"])
        if i == 0:
            model = peft.get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(ALL)
    fastlora.optimize(randomize(model))
    x = torch.randn(len(names), 5, 8)
    return train(model, ranks, settings, own(x, ranks), adapter_names=own(list(names), ranks))


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        targets = {"target_modules": ["q_proj"], "target_parameters": parameters_of("qwen3")}
        self.model = adapt(base_model(), 0.1, r=4, **targets)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def experts(ranks: int) -> Found:
    """A model with adapters on its experts; sharded if there are several ranks."""
    model = Logits()
    if ranks > 1:
        for block in (*model.model.get_base_model().model.layers, model):
            fully_shard(block)
    return train(model, 1, {}, own(IDS, ranks))


class Step(NamedTuple):
    """A training step: output and gradients, the number of fast blocks, the report after it."""

    numbers: list[Tensor]
    blocks: int
    report: str


def step_of(model: nn.Module) -> Step:
    """One step, the same in every rank, so that a mean over ranks equals any rank's value."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    with counted_blocks() as calls:
        y = model(x)
    y.float().square().mean().backward()
    gradients = [training.whole(p.grad) for p in model.parameters() if p.requires_grad]
    return Step([y.detach(), *gradients], len(calls), str(fastlora.coverage(model)))


def quantized_mlp(
    kind: str, storage: torch.dtype = torch.uint8, compute: torch.dtype = torch.float32
) -> nn.Module:
    """A gated MLP of 4-bit layers, with the same weights in every process.

    ``kind``: peft, or optimized.
    """
    torch.manual_seed(1)
    block = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=128))
    for name in PARTS:
        sizes = (128, 64) if name == "down_proj" else (64, 128)
        setattr(block, name, quantized("nf4", *sizes, compute, quant_storage=storage))
    settings = {"r": 3, "target_modules": list(PARTS), "init_lora_weights": False}
    model = nn.Sequential(block).requires_grad_(False)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    if kind == "optimized":
        fastlora.optimize(model)
    return model


def quantized_sharded(storage: torch.dtype, units: str, cast: torch.dtype | None) -> Step:
    """``units``: modules that are sharded by themselves.  ``cast``: FSDP's param_dtype."""
    model = quantized_mlp("optimized", storage, cast or torch.float32)
    (block,) = [module for module in model.modules() if isinstance(module, LlamaMLP)]
    of = {"model": [], "block": [block], "layers": [getattr(block, name) for name in PARTS]}
    for module in (*of[units], model):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=cast))
    return step_of(model)
