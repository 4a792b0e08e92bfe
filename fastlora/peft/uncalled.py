"""Layers whose weight torch's own modules read without calling them: their adapters do nothing."""

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention as PeftAttention
from torch import nn

from ..modules import plain_name, some


def why_uncalled(model: nn.Module) -> dict[nn.Module, str]:
    """The layers whose weight something reads without calling them, and what comes of it."""
    found: dict[nn.Module, str] = {}
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    for attention in attentions:
        found[attention.out_proj] = (
            "nothing calls it: torch.nn.MultiheadAttention reads its weight alone, so that its "
            "adapter has no effect and gets no gradient, in PEFT too"
        )
    for module in model.modules():
        if isinstance(module, PeftAttention):
            found[module.get_base_layer().out_proj] = (
                "nothing calls it: PEFT's MultiheadAttention merges it in each call"
            )
    return found


def encoder_notes(model: nn.Module) -> tuple[str, ...]:
    """On adapters that torch's fast path of encoder layers passes over in evaluation."""
    names = [
        plain_name(f"{name}.{part}".removeprefix("."))
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer) and module.self_attn.batch_first
        for part in ("linear1", "linear2")
        if isinstance(getattr(module, part), LoraLayer)
    ]
    if not names or not torch.backends.mha.get_fastpath_enabled():
        return ()
    return (
        f"{some(names)}: in evaluation torch.nn.TransformerEncoderLayer may read their weights and "
        "not call them, so that their adapters have no effect, in PEFT too: "
        "torch.backends.mha.set_fastpath_enabled(False) avoids it",
    )
