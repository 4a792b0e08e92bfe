"""A model for the price list from its folder or config; no weights are read.

Apart from :mod:`fastlora.trainer` only this file imports transformers, when it is called.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..model.config import LoRAConfig
from .quote import measured, plan
from .record import Plan

# So much of the memory that is free may be the model's weights: gradients and what is kept for
# the backward come beside them.
_SHARE = 0.4


def plan_of(
    place: str,
    ranks: Sequence[int],
    dropout: float = 0.0,
    *,
    parameters: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """:func:`fastlora.plan` of the model of a folder; times are of as much of it as fits.

    Every linear layer is adapted, and those of its experts' weights that ``parameters`` names.
    """
    whole, part, depth, total = load(place, dtype, layers if rounds else 1)
    config = LoRAConfig(
        target_modules="all-linear", target_parameters=parameters, lora_dropout=dropout
    )
    found = plan(whole, ranks, config=config, rounds=0)
    if not rounds:
        return found
    if depth < total:
        note = f"the time and what is kept: of the first {depth} of {total} layers, and the head"
        found = replace(found, notes=(*found.notes, note))
    return measured(found, part, config, None, rounds, progress)


class Loaded(NamedTuple):
    """``whole`` on meta, to count; ``part``, to measure: it, or its first ``depth`` layers."""

    whole: nn.Module
    part: nn.Module
    depth: int
    total: int


def load(place: str, dtype: torch.dtype | None, layers: int | None) -> Loaded:
    """The causal language model of a folder with a ``config.json``, or of such a file.

    Its weights are random.  ``dtype`` is the config's if None; ``layers`` is as many as memory
    allows.  Raises ValueError for what is no config, and ImportError without transformers.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            "a plan of a config needs transformers: pip install transformers"
        ) from error
    if not Path(place).exists():
        raise ValueError(f"{place!r} is neither a folder nor a file: give a model's config.json")
    try:
        config = AutoConfig.from_pretrained(place)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("it has an encoder and a decoder")
        config.dtype = dtype or getattr(config, "dtype", None) or torch.float32
        whole = _build(AutoModelForCausalLM, config, "meta")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place!r} can't be made a causal language model: {error}") from error
    total = config.get_text_config().num_hidden_layers
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    depth = min(total, layers or _fitting(whole, total, device))
    return Loaded(whole, _build(AutoModelForCausalLM, _cut(config, depth), device), depth, total)


def _build(factory: Any, config: Any, device: str | torch.device) -> nn.Module:
    with torch.device(device):
        model = factory.from_config(config, dtype=config.dtype)
    model.config.use_cache = False  # as in training
    return model


def _cut(config: Any, depth: int) -> Any:
    """The config with its first ``depth`` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    total, text.num_hidden_layers = text.num_hidden_layers, depth
    for name, value in vars(text).items():  # such as layer_types
        if isinstance(value, list) and len(value) == total != depth:
            setattr(text, name, value[:depth])
    return config


def _fitting(model: nn.Module, total: int, device: torch.device) -> int:
    """How many layers' weights fit into the memory's share, at least one."""
    inside = outside = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if any(part.isdigit() for part in name.split(".")):
            inside += size
        else:
            outside += size
    room = _SHARE * _free(device) - outside
    return max(1, min(total, int(room * total / max(inside, 1))))


def _free(device: torch.device) -> int:
    """Bytes of memory that are free on a device; much where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**62
