"""Measure which plan and tiles are fastest on this GPU: ``fastlora.tune``."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import nn

from ..backends import backend_name
from ..backends.sizes import Sizes
from ..call.projection import DTYPES
from ..common.clock import clock_for, medians
from ..common.other_packages import optional
from ..common.text import bar, columns
from ..common.values import check_settings, check_switches, is_number, must
from ..layers.classes import change_classes
from ..layers.linear import replace_linears
from ..layers.mlp import gated_classes
from ..peft.targets import linear_layers
from .calls import products_of

_FEWEST, _ROUNDS = 3, 9  # least and most rounds of timing
_MOST_TILES = 8  # in addition to the default tiles
_FOR_TILES = 0.7  # share of a product's time after which no further tiles are tried
_CLEARLY = 0.99  # another plan must take less than this share of the default plan's time

_TITLES = ("rows x in x out", "default", "best", "ms", "/ default")


@dataclass(frozen=True)
class Tuned:
    """One base product, of a forward (y) or a backward (dx).

    ``best``: the plan that runs from now on, with its tiles unless they are the default ones.
    ``default``: the plan without tuning.  Times are the device's, in seconds, of the whole forward
    or backward, adapter included.  None means that the default plan doesn't run.
    """

    product: str
    default: str
    best: str
    seconds: float
    default_seconds: float | None = None


@dataclass(frozen=True)
class Tuning:
    """A line for each product; prints as a table.  ``notes`` explain missing products.

    ``path``: the file that later processes read; "" if nothing was written.
    """

    device: str
    lines: tuple[Tuned, ...] = ()
    notes: tuple[str, ...] = ()
    path: str = ""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [_TITLES]
        for line in self.lines:
            before, ms = line.default_seconds, f"{line.seconds * 1e3:.3f}"
            ratio = "–" if before is None else f"{line.seconds / before:.3f}"
            rows.append((line.product, line.default, line.best, ms, ratio))
        table = [f"on {self.device}", *columns(rows, left=3)] if self.lines else []
        where = [f"written to {self.path}"] if self.path else []
        return "\n".join([*table, *self.notes, *where])


def tune(
    model: nn.Module,
    tokens: int,
    *,
    dtype: torch.dtype | None = None,
    seconds: float = 120.0,
    progress: bool = True,
) -> Tuning:
    """Measure the fastest plan and tiles for the model's LoRA layers, and use them from now on.

    ``tokens`` is the number of rows in a step: batch size times length.  For each kind of layer,
    forward and backward, two plans are timed: *fused*, where one Triton kernel computes the base
    product and the adapter, with the default tiles and up to eight others; and *in place*, where
    torch adds the base product to the adapter's part.  A plan with a wrong result is not timed.
    Tensors are random: the model isn't called, and may be on ``meta``.

    The fastest plans and tiles are written to a file for this device in the user's cache
    (``FASTLORA_CACHE``), together with earlier results.  Calls of similar sizes (within two
    doublings in all) use them, here and in later processes with the same Triton.  Results change by
    rounding.  On a CPU, and on devices without Triton kernels, nothing is measured, and a note says
    so.

    ``dtype``: the dtype of the calls if it isn't the weights', as under autocast; the default for
    packed weights is bfloat16.  ``seconds``: approximate time limit of the whole call.
    ``progress``: whether to show a bar.

    Returns a :class:`fastlora.tuning.Tuning`, which prints as a table.  Raises TypeError if
    ``model`` is not a module.  Raises ValueError for a model without LoRA layers and for invalid
    numbers.  If it fails or is interrupted, the file is unchanged.
    """
    must(type(tokens) is int and tokens > 0, "tokens", tokens, "a whole number of at least 1")
    must(dtype in (None, *DTYPES), "dtype", dtype, "a floating dtype of 16 to 64 bits")
    check_switches(progress=progress)
    must(is_number(seconds) and seconds > 0, "seconds", seconds, "a number above 0")
    # Imported late: ``import fastlora`` needs neither the doctor nor the kernels.
    from ..doctor.machine import devices_here

    with torch.no_grad():
        products, said = products_of(model, tokens, dtype)
    here = [weight.device for weight in model.parameters() if weight.device.type == "cuda"]
    device = here[0] if here else devices_here()[-1]
    # Finite, because the number of rounds is computed from it.
    name, is_gpu, end = "", device.type == "cuda", monotonic() + min(seconds, 1e9)
    if backend_name(device=device) == "triton":
        from ..backends.triton import measured, why_not

        name = measured.name_of(device)
    if not name:
        nothing = f"there is nothing to tune on {device}: it runs no compiled Triton kernels"
        return Tuning(str(device), (), (nothing,))
    measured_rows = []
    with torch.no_grad(), torch.cuda.device(device) if is_gpu else nullcontext():
        for i, product in enumerate(bar(products, "tuning", "product") if progress else products):
            reason, now = why_not(product.dtype, device, ()), monotonic()
            if now >= end:
                reason = "the time was over"
            try:
                if not reason:  # each remaining product gets an equal share of the remaining time
                    share = (end - now) / (len(products) - i)
                    measured_rows += _measured(product, device, now, share, said)
            except torch.OutOfMemoryError:
                reason = "there isn't enough memory"
            if reason:
                said.append(f"{product} wasn't measured: {reason}")
    path = measured.keep(name, [row for _, row in measured_rows]) if measured_rows else ""
    if measured_rows and not path:
        said.append(f"{measured.path_of(name)} can't be written: only this process uses it")
    return Tuning(name, tuple(line for line, _ in measured_rows), tuple(said), path)


def command(
    model: str, tokens: int, r: int, dtype: str | None, dropout: float, seconds: float
) -> Tuning:
    """``python -m fastlora tune``: tunes for a named model, all of whose linear layers train.

    The model is made on meta, so only its config is read.
    """
    check_settings(r, 1, dropout)
    transformers = optional("transformers", f"tune {model} needs transformers", "demo")
    about = transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(about)
        made.to(getattr(about, "dtype", None) or torch.bfloat16)
        layers = sorted(linear_layers(made))
        replace_linears(made, layers, r=r, lora_alpha=r, lora_dropout=dropout)
        change_classes(gated_classes(made.modules()))  # so that gate and up count as one product
    kind = getattr(torch, dtype) if dtype else None
    return tune(made, tokens, dtype=kind, seconds=seconds)


def _measured(
    product: Sizes, device: torch.device, start: float, share: float, said: list[str]
) -> list[tuple[Tuned, Any]]:
    """A line for the table and a row for the file; empty if no plan gives the right result.

    ``start`` and ``share``: when this product's measurement began, and its seconds.
    """
    from ..backends.triton.plans import PlanRunner

    contest, steps = PlanRunner(product, device), dict[Any, Callable]()
    # The first two plans, in place and fused, have the default tiles.
    for plan in contest.plans()[: 2 + _MOST_TILES]:
        if plan.gemm is not None and monotonic() >= start + _FOR_TILES * share:
            break
        try:
            why = contest.why_wrong(plan)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # from the compiler or the driver: this plan can't run
            why = f"{type(error).__name__}: {error}"
        if why:
            said.append(f"{product}, {_named(plan)}: {' '.join(why.split())[:400]}")
        else:
            steps[plan] = contest.step(plan)
    if not steps:
        return []
    default, clock, before = contest.default(), clock_for(device), monotonic()
    medians(clock, steps, 1)  # warms up
    now = monotonic()
    # As many rounds as the rest of the share allows, if each takes as long as the warm-up.
    left = int((start + share - now) / max(now - before, 1e-9))
    seconds = medians(clock, steps, min(max(left, _FEWEST), _ROUNDS))
    # The default plan wins unless another one is clearly faster.
    best = min(steps, key=lambda plan: seconds[plan] * (_CLEARLY if plan == default else 1.0))
    times = seconds[best], seconds.get(default)
    return [(Tuned(str(product), _named(default), _named(best), *times), contest.row(best))]


def _named(plan: Any) -> str:
    """The plan's name, with its tiles unless they are the default ones."""
    if plan.gemm is None:
        return "fused" if plan.fused else "in place"
    block_m, block_n, block_k, warps, stages, group, descriptors = vars(plan.gemm).values()
    tiles = f"{block_m}x{block_n}x{block_k}, {warps} warps, {stages} stages, group {group}"
    return f"fused, {tiles}{', descriptors' * descriptors}"
