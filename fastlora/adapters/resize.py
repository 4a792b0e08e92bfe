"""Cut an adapter to a lower rank, with the least error in each layer: ``fastlora.resize_adapter``.

From rank 16 to rank 4, the demo's adapter keeps its held-out loss (2.301 before, 2.304 after;
docs/rank.md).
"""

import io
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..call.projection import Adapter
from ..common.other_packages import optional
from ..common.text import columns
from ..common.values import check_settings, is_number, must
from ..layers.linear import scaling_of
from ..layers.modules import called
from ..packing.files import check_folder, write_adapter, write_whole
from .stored import check_output, flat, open_adapter, patterns


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's rank before and after the cut, and its singular values before.

    ``values``: singular values of scale · lora_B lora_A, [experts, k], the largest first.
    ``per_rank``: the number of parameters per rank.
    """

    name: str
    r: int
    r_after: int
    values: Tensor
    per_rank: int

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ / Σ σ (Roy and Vetterli 2007); the mean over experts.

        It is the rank if all values are equal, 1 if only one isn't zero, and 0 for zeros.
        """
        total = self.values.sum(-1, keepdim=True)
        entropy = torch.special.entr(self.values / total.where(total > 0, 1.0)).sum(-1)
        return float(entropy.exp().where(total[:, 0] > 0, 0.0).mean())

    @property
    def loss(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖, ΔW' being the cut ΔW."""
        return _ratio([self])


@dataclass(frozen=True)
class Spectra:
    """A record for each layer.  Prints as a table."""

    layers: tuple[LayerSpectrum, ...]

    @property
    def effective_rank(self) -> float:
        """The mean over the layers."""
        return sum(layer.effective_rank for layer in self.layers) / len(self.layers)

    @property
    def loss(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ over all layers together."""
        return _ratio(self.layers)

    def __str__(self) -> str:
        rows = [
            (x.name, str(x.r), f"{x.effective_rank:.1f}", str(x.r_after), f"{x.loss:.4f}")
            for x in self.layers
        ]
        before = sum(layer.r * layer.per_rank for layer in self.layers)
        after = sum(layer.r_after * layer.per_rank for layer in self.layers)
        last = (
            f"{len(rows)} layers, effective rank {self.effective_rank:.1f} on average, lost "
            f"{self.loss:.4f} of all; {before:,} parameters before, {after:,} after"
        )
        return "\n".join([*columns([_TITLES, *rows], left=1), last])

    def plot(self, path: str | os.PathLike) -> None:
        """Draw each layer's singular values, divided by the largest one, as a PNG.

        Raises ImportError without matplotlib.
        """
        place = check_folder(path)
        drawing = optional("matplotlib.figure", "plot needs matplotlib", "plot")
        figure, content = drawing.Figure(figsize=(7, 4.5), layout="constrained"), io.BytesIO()
        axes = figure.add_subplot()
        for layer in self.layers:
            for values in layer.values.tolist():
                seen = [value / values[0] for value in values if value]
                axes.plot(range(1, len(seen) + 1), seen, lw=0.8, alpha=0.6)
        axes.set(xlabel="number", ylabel="singular value / the largest", yscale="log")
        figure.savefig(content, format="png", dpi=120)
        write_whole(place.parent, {place.name: content.getvalue()})


_TITLES = ("layer", "rank", "effective rank", "rank after", "lost")


def _ratio(layers: tuple[LayerSpectrum, ...] | list[LayerSpectrum]) -> float:
    whole = sum(float(layer.values.square().sum()) for layer in layers)
    # ‖ΔW‖² = Σ σ².  The cut sets the values after the first r_after to zero.
    lost = sum(float(layer.values[:, layer.r_after :].square().sum()) for layer in layers)
    return math.sqrt(lost / whole) if whole else 0.0


def cut(
    name: str,
    adapter: Adapter[Tensor],
    rank: int | None,
    energy: float | None,
    alpha: float,
    use_rslora: bool,
) -> tuple[Adapter[Tensor], LayerSpectrum]:
    """The adapter at a lower rank, scaled for this alpha, and the spectrum of the given one.

    The truncated SVD is the best approximation (Eckart and Young 1936).  The product [E, q, p] of
    lora_a [E, r, p] and lora_b [E, q, r] is never formed: a QR of both factors leaves an SVD of
    r × r.  If the rank needs no cut, only the scale of lora_b changes.
    """
    lora_a, lora_b, before = adapter
    (experts, r, p), q = lora_a.shape, lora_b.shape[1]
    left, upper = torch.linalg.qr(lora_b)  # [E, q, k], [E, k, r]
    right, lower = torch.linalg.qr(lora_a.mT)  # [E, p, k'], [E, k', r]
    product = before * (upper @ lower.mT)  # same singular values as lora_b @ lora_a
    if not product.isfinite().all():
        raise ValueError(f"{called(name)} has a product that is too large for float64")
    inner, values, outer = torch.linalg.svd(product, full_matrices=False)
    # Values below the rounding error of the product count as zero.  The bound uses the norms of the
    # single ranks, because in a sum of adapters the ranks may cancel.
    size = abs(before) * (upper.norm(dim=-2) * lower.norm(dim=-2)).sum(-1, keepdim=True)
    noise = max(p, q) * torch.finfo(values.dtype).eps * size
    values = values.where(values > noise, 0.0)
    if energy is not None:
        squares = values.square().sum(0)  # summed over experts, which share one rank
        tails = squares.flip(0).cumsum(0).flip(0)  # the loss of a cut before each value
        # Keep each value without which more than a share of 1 - energy would be lost.
        rank = max(1, int((tails > (1.0 - energy) * tails[0]).sum()))
    # A product [q, p] has min(r, p, q) singular values.
    new_r = r if rank is None or rank >= r else min(rank, values.shape[-1])
    spectrum = LayerSpectrum(name, r, new_r, values, experts * (p + q))
    scale = scaling_of(alpha, new_r, use_rslora)
    if new_r == r:
        # This keeps scale · lora_B lora_A, which is zero if the scale is.
        return Adapter(lora_a, lora_b * (before / scale if scale else 1.0), scale), spectrum
    # Divide each singular value evenly between both factors; lora_b takes the scale's sign.
    root = (values[:, :new_r] / (abs(scale) or 1.0)).sqrt()
    small_a = root[:, :, None] * (outer @ right.mT)[:, :new_r]
    small_b = (left @ inner)[:, :, :new_r] * (root[:, None] * math.copysign(1.0, scale))
    return Adapter(small_a, small_b, scale), spectrum


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
