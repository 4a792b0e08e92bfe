"""Combine several adapters into one, their weighted sum: ``fastlora.combine_adapters``."""

import math
import os
import re
from collections.abc import Sequence
from posixpath import normpath
from typing import Any

import torch
from torch import Tensor

from ..layers.modules import called, some
from ..packing.files import CONFIG, write_adapter
from ..projection import Adapter
from ..settings import check_settings, is_number
from ..text import shown
from .config import weight_of
from .keys import pairs_of
from .peft_config import from_peft
from .spectrum import LayerSpectrum, Spectra, cut
from .stored import Stored, check_output, flat, is_copy, open_adapter, patterns

# Settings that must be equal in all adapters that have them.
_ALIKE = ("base_model_name_or_path", "task_type", "bias", "modules_to_save", "fan_in_fan_out")
_CHOICES = ("exclude_modules", "layers_to_transform", "layers_pattern")
_TARGETS = ("target_modules", "target_parameters", *_CHOICES)


def combine_adapters(
    folders: Sequence[str | os.PathLike],
    weights: Sequence[float],
    output: str | os.PathLike,
    *,
    rank: int | None = None,
) -> Spectra:
    """Write Σ weight · ΔW of several adapters as one adapter, in PEFT's files.

    The sum stacks the lora_A and the lora_B, so it is exact up to rounding, and its rank is the sum
    of the ranks.  It is float32, or float64 if an adapter is.  Scales, with or without rsLoRA, are
    folded into lora_B; ranks, alphas and adapted layers may differ.  ``rank``: cut the sum to at
    most this rank, as :func:`fastlora.resize_adapter` does.

    Returns a report with the ranks of the sum before and after the cut.  Raises the errors of
    ``resize_adapter``, and ValueError if the adapters can't be summed: a layer's shapes, trained
    biases, modules_to_save or base models differ, or they share no layer and don't name the same
    base model.
    """
    if isinstance(folders, str | os.PathLike) or not 0 < len(folders) == len(weights):
        raise ValueError(
            f"folders is {shown(folders)} and weights {shown(weights)}, but must be a list of "
            "adapters' folders and a list of as many weights"
        )
    for weight in weights:
        if not is_number(weight) or not math.isfinite(weight):
            raise ValueError(f"weights has {shown(weight)}, but must hold finite numbers")
    if rank is not None:
        check_settings(rank, 1, 0.0)
    adapters = [open_adapter(folder) for folder in folders]
    path = check_output(output, [each.path for each in adapters])
    _check_one_base(adapters)
    experts = {n: weight.is_parameter for each in adapters for n, weight in each.layers.items()}
    # PEFT's order of a module's weights: down_proj is last, hence outermost in the file's keys.
    names = sorted(experts, key=lambda name: experts[name] and name.endswith("down_proj"))
    keys = pairs_of(names, {name for name in names if experts[name]})
    settings = adapters[0].settings | _settings(adapters, experts)
    tensors = _others(adapters)
    alpha = rank or sum(each.config.r for each in adapters)  # so that the sum's scale is near 1
    spectra: list[LayerSpectrum] = []
    for name in names:
        total, dtype = _stacked(name, adapters, weights)
        small, spectrum = cut(name, total, rank, None, alpha, use_rslora=False)
        tensors |= zip(keys[name], flat(name, small, dtype), strict=True)
        spectra.append(spectrum)
    ranks = {spectrum.name: spectrum.r_after for spectrum in spectra}
    config = from_peft(settings, "the sum")
    settings |= patterns(config, ranks, dict.fromkeys(ranks, alpha))
    write_adapter(path, settings, tensors)
    return Spectra(tuple(spectra))


def _check_one_base(adapters: list[Stored]) -> None:
    """Raise ValueError for adapters with no layer in common that don't name one base model."""
    groups: list[tuple[set[str], Stored]] = []
    for each in adapters:
        shared = [one for one in groups if not one[0].isdisjoint(each.layers)]
        names = {*each.layers}.union(*(one[0] for one in shared))
        groups = [one for one in groups if one not in shared] + [(names, each)]
    named = all(each.settings.get("base_model_name_or_path") for each in adapters)
    if len(groups) > 1 and not named:
        (first, one), (second, other), *_ = groups
        raise ValueError(
            f"{one.path} and {other.path} share no layer ({some(sorted(first))}; "
            f"{some(sorted(second))}): are they adapters of one base model? If so, write its name "
            f"into base_model_name_or_path of each {CONFIG}"
        )


def _stacked(
    name: str, adapters: list[Stored], weights: Sequence[float]
) -> tuple[Adapter[Tensor], torch.dtype]:
    """The sum of the adapters that have this layer, in float64, and the dtype to write it in."""
    lora_a, lora_b, sizes, dtype = [], [], set(), torch.float32
    # Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁ s₁ B₁, w₂ s₂ B₂, …] [A₁; A₂; …]
    for each, weight in zip(adapters, weights, strict=True):
        if name in each.layers:
            adapter = each.read(name)
            lora_a.append(adapter.lora_a)
            lora_b.append(adapter.lora_b * (adapter.scale * weight))
            sizes.add((len(adapter.lora_a), adapter.lora_b.shape[1], adapter.lora_a.shape[2]))
            dtype = torch.promote_types(dtype, each.layers[name].dtype)
    if len(sizes) > 1:
        raise ValueError(
            f"{called(name)} has unlike shapes (experts, out, in), {sorted(sizes)}: give adapters "
            "of one base model"
        )
    return Adapter(torch.cat(lora_a, dim=1), torch.cat(lora_b, dim=2)), dtype


def _settings(adapters: list[Stored], experts: dict[str, bool]) -> dict[str, Any]:
    """The settings of the sum that may differ from the first adapter's."""
    dropout = min(each.config.lora_dropout for each in adapters)
    fields: dict[str, Any] = {"use_rslora": False, "lora_dropout": dropout}
    for field in _ALIKE:
        values = [each.settings.get(field) for each in adapters]
        values = [sorted(value) if isinstance(value, list) else value for value in values]
        if field == "base_model_name_or_path":  # compare folders, however their paths are spelled
            values = [normpath(v) if v and isinstance(v, str) else v for v in values]
        said = [value for value in values if value not in (None, "", [])] or values
        if any(value != said[0] for value in said):
            raise ValueError(
                f"the adapters have {field} {' and '.join(map(shown, said))}: they can't be summed"
            )
        fields[field] = said[0]
    configs = [adapter.config for adapter in adapters]
    # Unlike targets: name every layer of the sum.
    if any(getattr(c, field) != getattr(configs[0], field) for c in configs for field in _TARGETS):
        weights = {name for name in experts if any(c.names_weight_of(name) for c in configs)}
        stacks = {name for name in experts if experts[name]}
        fields |= dict.fromkeys(_CHOICES)
        fields["target_modules"] = _naming(sorted(experts.keys() - weights - stacks))
        fields["target_parameters"] = sorted([*map(weight_of, weights), *stacks]) or None
    return fields


def _naming(names: list[str]) -> list[str] | str:
    """Targets that match exactly these names.

    A list also matches names that end with a listed one; if that happens, it is a regular
    expression.
    """
    ends = {name.split(".", dots + 1)[-1] for name in names for dots in range(name.count("."))}
    return names if ends.isdisjoint(names) else "|".join(map(re.escape, names))


def _others(adapters: list[Stored]) -> dict[str, Tensor]:
    """The tensors that trained in full; they must be equal in all adapters."""
    first, *others = (adapter.read_others() for adapter in adapters)
    for tensors in others:
        both = first.keys() & tensors.keys()
        unlike = {k for k in first.keys() ^ tensors.keys() if not is_copy(k)}
        unlike |= {k for k in both if not first[k].equal(tensors[k])}
        if unlike:
            raise ValueError(
                f"the adapters have unlike {some(sorted(unlike))}, and biases and modules that "
                "trained in full can't be summed: give adapters without them"
            )
        first |= tensors
    return first
