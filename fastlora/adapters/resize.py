"""An adapter of a lower rank, layer by layer the best that there is."""

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..model.checkpoint import save_adapter
from ..model.files import write_adapter
from ..projection import check_settings, is_number, shown
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

    By singular values in float64, a layer at a time.  ``rank``: at most this one; ``energy``, in
    (0, 1]: the least one that keeps this share of the squared singular values, layer by layer, and
    one for all experts of a stack.  Without both it only reports.

    ``adapter``: a folder with PEFT's files, or a model with an adapter of fastlora's or PEFT's
    (``adapter_name``), which stays as it is.  ``output``: a folder for the result in PEFT's files,
    with a rank_pattern; lora_alpha, trained biases and modules_to_save stay, and so do the tensors
    of layers that need no cut.

    Returns the report, which prints as a table; ``report.plot(path)`` draws it.  Raises what
    :func:`fastlora.load_adapter` raises for a folder, and ValueError for DoRA, adapters of
    embeddings, NaN, a rank or energy that can't be meant, and an output that is the folder itself
    or has something else in it; nothing is written then.
    """
    if rank is not None:
        check_settings(rank, 1, 0.0)
    if energy is not None and not (is_number(energy) and 0.0 < energy <= 1.0):
        raise ValueError(
            f"energy is {shown(energy)}, but must be above 0 and at most 1: the share of the "
            "squared singular values to keep"
        )
    if rank is not None and energy is not None:
        raise ValueError("rank and energy are two ways to say it: give one")
    if output is not None and rank is energy is None:
        raise ValueError("output is for what is cut: give rank or energy, too")
    if isinstance(adapter, nn.Module):
        with tempfile.TemporaryDirectory(prefix="fastlora-") as scratch:
            folder = _saved(adapter, adapter_name, scratch)
            return resize_adapter(folder, rank=rank, energy=energy, output=output)
    stored = open_adapter(adapter)
    path = None if output is None else check_output(output, [stored.path])
    config, spectra = stored.config, []
    tensors: dict[str, Tensor] = {}
    alphas = {name: config.alpha_of(name) for name in stored.layers}
    for name, layer in stored.layers.items():
        whole, alpha = stored.read(name), alphas[name]
        small, spectrum = cut(name, whole, rank, energy, alpha, config.use_rslora)
        spectra.append(spectrum)
        if path is not None:
            tensors |= zip(layer.keys, flat(name, small, layer.dtype), strict=True)
    if path is not None:
        ranks = {spectrum.name: spectrum.r_after for spectrum in spectra}
        settings = stored.settings | patterns(config, ranks, alphas)
        write_adapter(path, settings, tensors | stored.read_others())
    return Spectra(tuple(spectra))


def _saved(model: nn.Module, name: str, scratch: str) -> Path:
    """A folder with the model's adapter in PEFT's files."""
    peft: Any = model
    if not hasattr(model, "peft_config"):
        save_adapter(model, scratch)
        return Path(scratch)
    # transformers' models, and PEFT's other wrappers, would save what is active, or the whole base.
    if not hasattr(type(model), "create_or_update_model_card"):
        raise ValueError(
            f"the model is a {type(model).__name__} with adapters of PEFT's, but must be a "
            "PeftModel: save the adapter, and give its folder"
        )
    if name not in peft.peft_config:
        raise ValueError(f"the model has no adapter {name!r}: {', '.join(peft.peft_config)}")
    peft.save_pretrained(scratch, selected_adapters=[name])
    return Path(scratch) / ("" if name == "default" else name)
