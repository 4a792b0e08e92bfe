"""Which plan and tiles are fastest on this GPU: ``fastlora.tune``."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from time import monotonic
from typing import Any

import torch
from torch import nn

from ..backends import backend_name
from ..backends.sizes import Sizes
from ..clock import clock_for, medians
from ..model.config import LoRAConfig
from ..model.inject import apply_lora
from ..projection import DTYPES, check_switch, is_number, shown
from ..report import bar
from .calls import distinct, products_of
from .table import Tuned, Tuning

_TOKENS = 4096  # of a model's step, where nobody says
_FEWEST, _ROUNDS = 3, 9  # of timing
_MOST_TILES = 8  # beside the default ones
_FOR_TILES = 0.7  # of a product's time, after which no more are tried
_LONGEST = 1e9  # seconds; rounds are counted from them, and infinity has no number
_CLEARLY = 0.99  # of the default's time: what is above is no reason to leave it


def tune(
    model: nn.Module,
    tokens: int,
    *,
    dtype: torch.dtype | None = None,
    seconds: float = 120.0,
    progress: bool = True,
) -> Tuning:
    """Measure how this GPU best computes the model's LoRA layers, and compute them so from now on.

    ``tokens`` is how many rows a step has: batch size times length.  The base product of each kind
    of layer, forward and backward, is made by Triton in one kernel with the adapter (fused), by the
    default tiles and up to eight others, and by torch on top of the adapter's part (in place).
    What isn't PyTorch's result has no time.  torch's frozen layer and PEFT's, if it is installed,
    are beside.  Tensors are random: the model isn't called, and may be on ``meta``.

    The fastest plans and tiles are written to a file for this device in the user's cache
    (``FASTLORA_CACHE``), beside those of earlier calls.  Calls of about these sizes, within two
    doublings in all, go by it, here and in later processes with the same Triton.  Results change by
    rounding.  On a CPU, and wherever no Triton kernels run, nothing is measured, and a note says
    so.

    ``dtype``: that of the calls, where it isn't the weights', as under autocast; for packed weights
    it is bfloat16 by default.  ``seconds``: how long it may take in all, about.  ``progress``: with
    a bar.

    Returns a :class:`fastlora.tuning.table.Tuning`, which prints as a table.  Raises TypeError for
    what is no module, and ValueError for one without LoRA layers, and for numbers that can't be.
    If it fails or is interrupted, the file is as it was.
    """
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens is {shown(tokens)}, but must be a whole number of at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {shown(dtype)}, but must be a floating dtype of torch's")
    check_switch("progress", progress)
    _check_seconds(seconds)
    with torch.no_grad():
        products, notes = products_of(model, tokens, dtype)
    here = [each.device for each in model.parameters() if each.device.type == "cuda"]
    return _tuned(products, notes, here, seconds, progress)


def command(
    model: str | None, shape: Sequence | None, tokens: int | None, seconds: float, **about: Any
) -> Tuning:
    """``python -m fastlora tune``: of a model by name, every linear layer adapted, or of shapes.

    ``about``: r, dropout and dtype.
    """
    _check_seconds(seconds)
    r, dropout, dtype = about["r"], about["dropout"], about["dtype"]
    if bool(model) == bool(shape):
        raise ValueError("give a model, or --shape: one of the two")
    if model:
        config = LoRAConfig(r=r, lora_dropout=dropout, target_modules="all-linear")
        return tune(_on_meta(model, config), tokens or _TOKENS, dtype=dtype, seconds=seconds)
    if tokens:
        raise ValueError("--tokens is of a model: a --shape has its rows")
    dtype = dtype or torch.bfloat16
    forward = [Sizes(m, k, (n,), ((r,),), dtype, dropout=dropout) for m, k, n in shape or ()]
    backward = [replace(each, backward=True) for each in forward]
    return _tuned(distinct([*forward, *backward]), [], [], seconds, progress=True)


def _on_meta(name: str, config: LoRAConfig) -> nn.Module:
    """A causal language model of transformers, with adapters, of which only a config is read."""
    transformers = import_module("transformers")
    about = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    dtype = getattr(about, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        return apply_lora(transformers.AutoModelForCausalLM.from_config(about).to(dtype), config)


def _check_seconds(seconds: float) -> None:
    if not is_number(seconds) or not seconds > 0:
        raise ValueError(f"seconds is {shown(seconds)}, but must be a number above 0")


def _tuned(
    products: Sequence[Sizes], said: list[str], devices: list, seconds: float, progress: bool
) -> Tuning:
    """Measures as many as there is time for, on the first device, and keeps what was found."""
    from ..doctor.machine import devices_here  # here, since an import of fastlora needs no doctor

    device = devices[0] if devices else devices_here()[-1]
    name, is_gpu, end = "", device.type == "cuda", monotonic() + min(seconds, _LONGEST)
    if backend_name(device=device) == "triton":
        from ..backends.triton import measured, why_not  # here, since it imports the kernels

        name = measured.name_of(device)
    if not name:
        nothing = f"there is nothing to tune on {device}: it runs no compiled Triton kernels"
        return Tuning(str(device), (), (nothing,))
    measured_rows = []
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if is_gpu else []),  # PEFT's dropout draws
        torch.cuda.device(device) if is_gpu else nullcontext(),
    ):
        for i, product in enumerate(bar(products, "tuning", "product") if progress else products):
            reason, now = why_not(product.dtype, device, ()), monotonic()
            if now >= end:
                reason = "the time was over"
            try:
                if not reason:
                    share = (end - now) / (len(products) - i)
                    measured_rows += _measured(product, device, now, share, said)
            except torch.OutOfMemoryError:
                reason = "there isn't enough memory"
            if reason:
                said.append(f"{product} wasn't measured: {reason}")
    path = measured.keep(name, [row for _, row in measured_rows]) if measured_rows else ""
    if measured_rows and not path:
        said.append(f"{measured.path_of(name)} can't be written: it is for this process alone")
    return Tuning(name, tuple(line for line, _ in measured_rows), tuple(said), path)


def _measured(
    product: Sizes, device: torch.device, start: float, share: float, said: list[str]
) -> list[tuple[Tuned, Any]]:
    """A line and a row, if any plan is right; of the time that there is, the product has a share"""
    from ..backends.triton.plans import Contest

    contest, steps = Contest(product, device), dict[Any, Callable[[], object]]()
    for plan in contest.plans()[: 2 + _MOST_TILES]:
        if plan.gemm is not None and monotonic() >= start + _FOR_TILES * share:
            break
        try:
            why = contest.why_wrong(plan)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's, or a driver's
            why = f"{type(error).__name__}: {error}"
        if why:
            said.append(f"{product}, {_named(plan)}: {' '.join(why.split())[:400]}")
        else:
            steps[plan] = contest.step(plan)
    if not steps:
        return []
    default, ours = contest.default(), list(steps)
    if not product.experts:
        steps["frozen"] = contest.frozen()
    if not product.experts and len(contest.ranks) == len(product.outs):
        with suppress(ImportError), torch.enable_grad():
            from ..peft.baseline import step_of

            of_x = contest.x, contest.weights, contest.ranks
            steps["PEFT"] = step_of(*of_x, product.dropout, contest.dys)
    clock, before = clock_for(device), monotonic()
    medians(clock, steps, 1)  # warms up
    now = monotonic()
    left = int((start + share - now) / max(now - before, 1e-9))
    seconds = medians(clock, steps, min(max(left, _FEWEST), _ROUNDS))
    # A little isn't worth another kernel than the default.
    best = min(ours, key=lambda plan: seconds[plan] * (_CLEARLY if plan == default else 1.0))
    others = [seconds.get(each) for each in (default, "frozen", "PEFT")]
    line = Tuned(str(product), _named(default), _named(best), seconds[best], *others)
    return [(line, contest.row(best))]


def _named(plan: Any) -> str:
    """With its tiles, if they aren't the default ones."""
    if plan.gemm is None:
        return "fused" if plan.fused else "in place"
    block_m, block_n, block_k, warps, stages, group, descriptors = vars(plan.gemm).values()
    tiles = f"{block_m}x{block_n}x{block_k}, {warps} warps, {stages} stages, group {group}"
    return f"fused, {tiles}{', descriptors' * descriptors}"
