"""What a rank does in the tests of reports and files under FSDP."""

import json
from functools import partial
from pathlib import Path

import peft_training as training
import torch
from models import randomise, tiny_llama
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from zero3 import Zero3

import fastlora


def fsdp1(model: nn.Module, by_peft_s_policy: bool = False) -> nn.Module:
    blocks = ModuleWrapPolicy({LlamaDecoderLayer})
    policy = fsdp_auto_wrap_policy(model) if by_peft_s_policy else blocks
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def fsdp2(model: nn.Module) -> nn.Module:
    for block in [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]:
        fully_shard(block)
    return fully_shard(model)


def step(model: nn.Module) -> None:
    ids = training.batch()
    model(input_ids=ids, labels=ids).loss.backward()


def reports(kind: str) -> list[fastlora.Coverage]:
    """Of a PEFT model under FSDP1: as optimize says it, strictly, and after a fast step."""
    model = fsdp1(training.peft_model(kind))
    first = fastlora.optimize(model, strict=True)
    with training.counted() as calls:
        step(model)
    assert len(calls) == training.LAYERS
    first = fastlora.Coverage(first.layers, first.notes, blocks=first.blocks)
    return [first, fastlora.coverage(model)]


def report_by_peft_s_policy() -> str:
    return str(fastlora.optimize(fsdp1(training.peft_model(), by_peft_s_policy=True)))


OWN = {
    "adapters": {},
    "biases": {"bias": "lora_only"},
    "all-biases": {"bias": "all"},
    "modules-to-save": {"modules_to_save": ["lm_head", "norm"]},
    "a-block-to-save": {"modules_to_save": ["layers.1"]},  # which FSDP shards by itself
    "frozen": {},
    "embeddings": {},
}


def own_model(what: str) -> nn.Module:
    torch.manual_seed(3)
    targets = ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"]
    config = fastlora.LoRAConfig(r=4, target_modules=targets, **OWN[what])
    model = randomise(fastlora.apply_lora(tiny_llama(attention_bias=True), config))
    if what == "frozen":  # as in LoRA-FA
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("lora_B"))
    return model


def saved(folder: str, kind: str, what: str) -> tuple[str, list[str]]:
    """Save a sharded model of fastlora's own after a step; its report, and the layers' names."""
    model = (fsdp1 if kind == "fsdp1" else fsdp2)(own_model(what))
    step(model)
    fastlora.save_adapter(model, folder, save_embedding_layers=what == "embeddings")
    torch.distributed.barrier()
    assert json.loads(Path(folder, "adapter_config.json").read_text())["r"] == 4
    report = fastlora.coverage(model)
    return str(report), [layer.name for layer in report.layers]


def save_under_zero3(folder: str) -> str:
    model = own_model("adapters")
    Zero3(model)
    try:
        fastlora.save_adapter(model, folder)
    except ValueError as error:
        return str(error)
    return "saved"


def load_and_save(folder: str, to: str, what: str) -> None:
    """An FSDP2 model, some of whose parameters a call has left whole, loads and saves."""
    model = own_model(what)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    fsdp2(model).eval()
    with torch.no_grad():
        model(input_ids=training.batch())
    fastlora.load_adapter(model, folder)
    model.reshard()
    fastlora.save_adapter(model, to, save_embedding_layers=what == "embeddings")
    torch.distributed.barrier()


def refusals() -> list[str]:
    """Of what FSDP2 and DDP would not notice: new adapters, and other weights."""
    config = fastlora.LoRAConfig(target_modules=["q_proj", "lm_head"])
    adapted, *plain = fsdp2(own_model("adapters")), fsdp2(tiny_llama()), tiny_llama()
    plain[1] = nn.parallel.DistributedDataParallel(plain[1])
    found = []
    with torch.no_grad():
        for model in (adapted, *plain):
            model(input_ids=training.batch())
    calls = [partial(fastlora.apply_lora, model, config) for model in plain]
    for call in (partial(fastlora.merge_lora, adapted), *calls):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    assert not any("lora" in name for m in plain for name, _ in m.named_parameters())
    return found
