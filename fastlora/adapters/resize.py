"""Cut an adapter to a lower rank, with the least error in each layer: ``fastlora.resize_adapter``.

From rank 16 to rank 4, the demo's adapter keeps its held-out loss (2.301 before, 2.304 after;
docs/rank.md).
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.values import check_settings, is_number, must
from ..packing.files import write_adapter
from .spectrum import Spectra, cut
from .stored import check_output, flat, open_adapter, patterns


def resize_adapter(
    adapter: str | os.PathLike | nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    output: str | os.PathLike | None = None,
    adapter_name: str = "default",
) -> Spectra:
    """Cut each layer's scale · lora_B lora_A to its best approximation of a lower rank.

    Singular values are computed in float64, a layer at a time.  ``rank``: the largest rank to keep.
    ``energy``, in (0, 1]: keep the smallest rank that has this share of the squared singular
    values, separately for each layer, and one rank for all experts of a stack.  Without both, it
    only reports.

    ``adapter``: a folder with PEFT's files, or a PeftModel, whose adapter ``adapter_name`` is read;
    the model doesn't change.  ``output``: a folder for the result in PEFT's files, with a
    rank_pattern.  lora_alpha, trained biases and modules_to_save stay, and so do the
    tensors of layers that need no cut.

    Returns a report, which prints as a table; ``report.plot(path)`` draws it.  Raises the errors of
    :func:`fastlora.load_adapter` for a folder, and ValueError for DoRA, adapters of embeddings,
    NaN, an invalid rank or energy, and an output folder that is the input folder or holds other
    files.  After an error nothing is written.
    """
    if rank is not None:
        check_settings(rank, 1, 0.0)
    is_share = energy is None or (is_number(energy) and 0.0 < energy <= 1.0)
    must(is_share, "energy", energy, "a share of the squared singular values, in (0, 1]")
    if rank is not None and energy is not None:
        raise ValueError("rank and energy both set the rank to keep: give only one")
    if output is not None and rank is energy is None:
        raise ValueError("output is given, but nothing is cut: give rank or energy")
    if isinstance(adapter, nn.Module):  # save it, so that both kinds take the same path
        with tempfile.TemporaryDirectory(prefix="fastlora-") as scratch:
            folder = _saved(adapter, adapter_name, scratch)
            return resize_adapter(folder, rank=rank, energy=energy, output=output)
    stored = open_adapter(adapter)
    path = None if output is None else check_output(output, [stored.path])
    config, spectra = stored.config, []
    tensors: dict[str, Tensor] = {}
    alphas = {name: config.alpha_of(name) for name in stored.layers}
    # One layer at a time, so memory is needed for one layer in float64.
    for name, layer in stored.layers.items():
        whole, alpha = stored.read(name), alphas[name]
        small, spectrum = cut(name, whole, rank, energy, alpha, config.use_rslora)
        spectra.append(spectrum)
        if path is not None:
            tensors |= zip(layer.keys, flat(name, small, layer.dtype), strict=True)
    if path is not None:
        ranks = {spectrum.name: spectrum.r_after for spectrum in spectra}
        settings = stored.settings | patterns(ranks, alphas)
        write_adapter(path, settings, tensors | stored.read_others())
    return Spectra(tuple(spectra))


def _saved(model: nn.Module, name: str, scratch: str) -> Path:
    """Save the model's adapter in PEFT's files in ``scratch``.  Returns the folder."""
    peft: Any = model
    # A transformers model or another PEFT wrapper would save the active adapters or the whole base.
    if not hasattr(type(model), "create_or_update_model_card"):
        raise ValueError(
            f"the model is a {type(model).__name__} with PEFT adapters, but must be a "
            "PeftModel: save the adapter, and give its folder"
        )
    if name not in peft.peft_config:
        raise ValueError(f"adapter_name is {name!r}, not one of {', '.join(peft.peft_config)}")
    peft.save_pretrained(scratch, selected_adapters=[name])
    return Path(scratch) / ("" if name == "default" else name)
