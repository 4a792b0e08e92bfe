"""What a rank does in the tests of reports and files under FSDP."""

import json
from functools import partial
from pathlib import Path

import peft_training as training
import torch
from models import randomise, tiny_llama
from peft_worker import flat, shard
from torch import nn
from zero3 import Zero3

import fastlora


def step(model: nn.Module) -> None:
    ids = training.batch()
    model(input_ids=ids, labels=ids).loss.backward()


def reports(kind: str) -> list[fastlora.Coverage]:
    """Of a PEFT model under FSDP1: as optimize says it, strictly, and after a fast step."""
    model = flat(training.peft_model(kind))
    first = fastlora.optimize(model, strict=True)
    with training.counted() as calls:
        step(model)
    assert len(calls) == training.LAYERS
    first = fastlora.Coverage(first.layers, first.notes, blocks=first.blocks)
    return [first, fastlora.coverage(model)]


def report_by_peft_s_policy() -> str:
    return str(fastlora.optimize(flat(training.peft_model(), "adapters")))


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
    model = (flat if kind == "fsdp1" else shard)(own_model(what))
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
    shard(model).eval()
    with torch.no_grad():
        model(input_ids=training.batch())
    fastlora.load_adapter(model, folder)
    model.reshard()
    fastlora.save_adapter(model, to, save_embedding_layers=what == "embeddings")
    torch.distributed.barrier()


def refusals() -> list[str]:
    """Of what FSDP2 and DDP would not notice: new adapters, and other weights."""
    config = fastlora.LoRAConfig(target_modules=["q_proj", "lm_head"])
    adapted, *plain = shard(own_model("adapters")), shard(tiny_llama()), tiny_llama()
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
