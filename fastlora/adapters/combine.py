"""Combine several adapters into one, their weighted sum: ``fastlora.combine_adapters``."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call.projection import Adapter
from ..common.text import shown
from ..common.values import check_settings, is_number, must
from ..layers.modules import called, some
from ..packing.files import write_adapter
from .config import pairs_of
from .resize import LayerSpectrum, Spectra, cut
from .stored import Stored, check_output, flat, open_adapter, patterns

# Settings that must be equal in all adapters that have them.
_ALIKE = ("base_model_name_or_path", "task_type", "fan_in_fan_out")
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
    ``resize_adapter``, and ValueError if the adapters can't be summed: a layer's shapes or base
    models differ, or biases or modules trained in full.
    """
    is_list = not isinstance(folders, str | os.PathLike) and len(folders) > 0
    must(is_list, "folders", folders, "a list of adapters' folders")
    fits = len(folders) == len(weights) and all(is_number(w) and math.isfinite(w) for w in weights)
    must(fits, "weights", weights, f"a list of {len(folders)} finite numbers, one for each folder")
    if rank is not None:
        check_settings(rank, 1, 0.0)
    adapters = [open_adapter(folder) for folder in folders]
    path = check_output(output, [each.path for each in adapters])
    if trained := [key for each in adapters for key in each.trained]:
        raise ValueError(
            f"the adapters have {some(sorted(trained))}, but biases and modules that trained in "
            "full can't be summed: give adapters without them"
        )
    experts = {n: weight.is_parameter for each in adapters for n, weight in each.layers.items()}
    keys = pairs_of(experts, {name for name in experts if experts[name]})
    settings = adapters[0].settings | _settings(adapters, experts)
    tensors: dict[str, Tensor] = {}
    alpha = rank or sum(each.config.r for each in adapters)  # so that the sum's scale is near 1
    spectra: list[LayerSpectrum] = []
    for name in experts:
        total, dtype = _stacked(name, adapters, weights)
        small, spectrum = cut(name, total, rank, None, alpha, use_rslora=False)
        tensors |= zip(keys[name], flat(name, small, dtype), strict=True)
        spectra.append(spectrum)
    ranks = {spectrum.name: spectrum.r_after for spectrum in spectra}
    settings |= patterns(ranks, dict.fromkeys(ranks, alpha))
    write_adapter(path, settings, tensors)
    return Spectra(tuple(spectra))


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
        said = [value for value in values if value not in (None, "")] or values
        if any(value != said[0] for value in said):
            raise ValueError(
                f"the adapters have {field} {' and '.join(map(shown, said))}: they can't be summed"
            )
        fields[field] = said[0]
    first = adapters[0].settings
    # Unlike targets: name every layer of the sum.
    if any(each.settings.get(field) != first.get(field) for each in adapters for field in _TARGETS):
        stacks = {name for name in experts if experts[name]}
        fields |= dict.fromkeys(_CHOICES)
        fields["target_modules"] = _naming(sorted(experts.keys() - stacks))
        fields["target_parameters"] = sorted(stacks) or None
    return fields


def _naming(names: list[str]) -> list[str] | str:
    """Targets that match exactly these names.

    A list also matches names that end with a listed one; if that happens, it is a regular
    expression.
    """
    ends = {name.split(".", dots + 1)[-1] for name in names for dots in range(name.count("."))}
    return names if ends.isdisjoint(names) else "|".join(map(re.escape, names))
