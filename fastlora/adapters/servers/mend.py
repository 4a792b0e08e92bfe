"""Rewrite an adapter in the form that a server loads, so that it computes the same function."""

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...call.projection import Adapter
from ..config import names_any, pairs_of
from ..llama_cpp import parts_of
from ..stored import flat, open_adapter
from .rules import Facts, Item, Server, attention_is

# A layer's name -> lora_a [E, r, in] and lora_b [E, out, r], and the dtype in the file.
_Pairs = dict[str, tuple[Adapter[Tensor], torch.dtype]]


def mended(facts: Facts, server: Server) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of the same adapter in the server's form.

    Lower ranks are padded with zeros to the largest one.  The config gets the most common scale.
    In a layer with another scale, lora_B is multiplied by own scale / common scale.  The layer
    becomes float32 if its dtype can't hold this product exactly.  Raises the errors of
    ``resize_adapter`` for a folder.
    """
    stored, kind = open_adapter(facts.path), facts.base["model_type"]
    renames = server.renames[""] | server.renames.get(kind, {})
    splits = server.stacks != "*" and kind not in server.stacks.split()

    def renamed(name: str) -> str:
        if server.roots and facts.base["wrapper"] == "none":  # a text model
            name = re.sub(r"\blanguage_model\.(model\.)?", "", name)
        name = ".".join(renames.get(part, part) for part in name.split("."))
        return f"model.{name}" if server.roots and name.startswith("layers.") else name

    pairs: _Pairs = {}
    for name, layer in stored.layers.items():
        pair = stored.read(name)
        parts = _split(name, pair, kind) if layer.is_parameter and splits else {name: pair}
        pairs |= {renamed(part): (own, layer.dtype) for part, own in parts.items()}
        item = Item(name, "lora", None)
        if server.copies_keys and item.last == "k_proj" and attention_is(item, facts, ["k_eq_v"]):
            pairs[renamed(name).removesuffix("k_proj") + "v_proj"] = pair, layer.dtype
    for whole, *its_parts in server.fuses:
        _fuse(pairs, whole, its_parts)
    stack_names = {
        renamed(n) for n, layer in stored.layers.items() if layer.is_parameter and not splits
    }
    settings, tensors = _uniform(pairs, stack_names, stored.settings.get("target_modules"))
    return stored.settings | settings, tensors | stored.read_others()


def _split(name: str, stack: Adapter[Tensor], kind: str) -> dict[str, Adapter[Tensor]]:
    """The layers of single experts that a stack of all experts holds."""
    layers = {}
    for part, lora_b in parts_of(name, stack.lora_b, {"model_type": kind}).items():
        module, last = part.rsplit(".", 1)
        for i, (a, b) in enumerate(zip(stack.lora_a, lora_b, strict=True)):
            layers[f"{module}.{i}.{last}"] = Adapter(a[None], b[None], stack.scale)
    return layers


def _fuse(pairs: _Pairs, whole: str, parts: list[str]) -> None:
    """Replace layers that read one x by one layer: A = [A₁; A₂; …], B = diagonal(B₁, B₂, …)."""
    for module in [name.removesuffix(parts[0]) for name in pairs if name.endswith(f".{parts[0]}")]:
        if all(module + part in pairs for part in parts):  # otherwise B's size is unknown
            found, dtypes = zip(*(pairs.pop(module + part) for part in parts), strict=True)
            scale = found[0].scale or 1.0
            lora_a = torch.cat([each.lora_a for each in found], 1)
            blocks = [each.lora_b[0] * (each.scale / scale) for each in found]
            lora_b = torch.block_diag(*blocks)[None]
            pairs[module + whole] = Adapter(lora_a, lora_b, scale), dtypes[0]


def _uniform(pairs: _Pairs, stack_names: set[str], targets: Any) -> tuple[dict, dict[str, Tensor]]:
    """The settings and tensors of an adapter with one rank and one scale."""
    scales = Counter(pair.scale for pair, _ in pairs.values() if pair.scale)
    scale = scales.most_common(1)[0][0] if scales else 1.0
    r = max(pair.lora_a.shape[1] for pair, _ in pairs.values())
    tensors: dict[str, Tensor] = {}
    for name, keys in pairs_of(pairs, stack_names).items():
        (lora_a, lora_b, own), dtype = pairs[name]
        lora_a = pad(lora_a, (0, 0, 0, r - lora_a.shape[1]))
        lora_b = pad(lora_b * (own / scale), (0, r - lora_b.shape[2]))
        if not lora_b.to(dtype).double().equal(lora_b):
            dtype = torch.promote_types(dtype, torch.float32)
        tensors |= zip(keys, flat(name, Adapter(lora_a, lora_b), dtype), strict=True)
    layers = [name for name in pairs if name not in stack_names]
    if layers and not (isinstance(targets, list) and all(names_any(targets, n) for n in layers)):
        # A pattern may match only some of the layers with a name, so all layers are named in full.
        is_pattern = isinstance(targets, str) and targets.lower() != "all-linear"
        targets = sorted(layers if is_pattern else {name.rpartition(".")[2] for name in layers})
    return {
        "r": r, "lora_alpha": scale * r, "use_rslora": False, "rank_pattern": {},
        "alpha_pattern": {}, "target_modules": targets,
        "target_parameters": sorted({".".join(n.split(".")[-2:]) for n in stack_names}) or None,
    }, tensors  # fmt: skip
