"""Adapters of PEFT's on the disk, what they change, and how they are spoilt."""

import json

import peft
import torch
from models import randomise, tiny_llama
from safetensors.torch import load_file, save_file

from fastlora.model.files import CONFIG, WEIGHTS


def llama() -> torch.nn.Module:
    torch.manual_seed(3)
    return tiny_llama()


def by_peft(folder, model=None, **settings):
    """An adapter of PEFT's in the folder."""
    torch.manual_seed(4)
    theirs = peft.get_peft_model(model or llama(), peft.LoraConfig(**settings))
    randomise(theirs).save_pretrained(folder)
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


def change_config(folder, **settings):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
