"""Times a launcher's call with several configs, beside torch's operations; verifies each first.

A *form* (forms.py) is a launcher's call without tensors: sizes, dtypes, settings.
"""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import asdict
from functools import partial

import torch

from fastlora.backends import find_backend
from fastlora.backends.protocol import LossRows, LossSettings
from fastlora.clock import clock_for, medians, wait_for
from fastlora.kernels.config import Config, candidates, default_config
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.plan import Plan, Row
from fastlora.kernels.target import Target, target_of, use_target

from .forms import Form, Operands
from .judge import TOLERANCE, checked
from .measure import digits
from .tree import last_error

_SECONDS, _ROUNDS = 15.0, 9  # seconds for compiling; rounds of timing
_KEPT = 5  # the most configs, and the most failures, in a row of results


def reached(form: Form, device: torch.device, most: int = 1, pool: Executor | None = None) -> dict:
    """The speed that a form reaches with its best config, as a row of results.

    ``most`` configs are tried, the default first.  A form with a base product is compared with the
    plan in place, in both orders, and with torch's product, which writes (mm) or adds (addmm); the
    row then also has the faster plan, as ``fastlora tune`` stores it.  Other forms are compared
    with a copy of x.  ``rates`` are 10¹² a second: FLOPs of the base product, or bytes that other
    forms move.  ``pool`` compiles in other processes, so that a crash there doesn't end the timing.
    """
    target, operands, launch_works = target_of(device), Operands(form, device), []
    default = default_config(form.kernel, target, form.call)
    tried = {str(each): each for each in candidates(form.kernel, target, form.call)[:most]}
    if pool:  # keep the configs that compile in time
        asked = [(form, target, each) for each in tried.values()]
        errors = compile_ahead(pool, _SECONDS, _compile, asked)
        tried = {str(config): config for (*_, config), error in errors.items() if not error}
    our_calls = {name: partial(operands.run, config) for name, config in tried.items()}
    if form.depths:
        out, p, q = operands.out, operands.ps[0], operands.qs[0]
        our_calls["in place"] = operands.run_in_place
        our_calls["in place, adapter last"] = partial(operands.run_in_place, adapter_first=False)
        torch_calls = {"mm": partial(torch.mm, p, q, out=out)}
        torch_calls["addmm"] = partial(torch.addmm, out, p, q, out=out)
        work = dict.fromkeys(our_calls | torch_calls, 2 * form.M * form.columns * sum(form.depths))
    else:
        source = torch.randn(form.M, form.columns, device=device).to(form.dtype)
        torch_calls = {"copy": partial(torch.empty_like(source).copy_, source)}
        with intercept(lambda launch: launch_works.append(launch.work())):
            operands.run(default)
        work = dict.fromkeys(our_calls, sum(each.loaded + each.stored for each in launch_works))
        work["copy"] = 2 * source.nbytes
    # Time all calls, and keep the fastest, the best of our configs, the default, and torch's.
    seconds, failures = _timed(form, device, operands.truth(), our_calls, torch_calls)
    best = min(tried.keys() & seconds, key=seconds.__getitem__, default="none ran")
    kept = {*sorted(seconds, key=seconds.__getitem__)[:_KEPT], best, str(default)}
    shown = {name: each for name, each in seconds.items() if name in kept or name not in tried}
    row = _row(form, shown, work, failures, str(default), best, len(tried))
    if form.depths:
        is_fused = seconds.get(best, math.inf) < seconds.get("in place", math.inf)
        plan = Plan(True, tried[best]) if is_fused else Plan(False)
        call, depth = form.call, sum(form.depths)
        size = (call.m, call.n, depth, call.r, call.itemsize, call.masked, call.projections)
        row["plan"] = asdict(Row(target.device, *size, plan, form.name.startswith("dx")))
    return row


def loss_reached(form: Form, device: torch.device) -> dict:
    """The same for a loss's kernel on logits [M, columns], beside PyTorch's operations and a copy.

    ``rates`` count the bytes that the kernel states, also for PyTorch's operations.
    """
    z = torch.randn(form.M, form.columns, device=device).to(form.dtype)
    target = torch.arange(form.M, device=device) % form.columns
    losses, leaf = torch.empty(form.M, device=device), z.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    truths = [truth.detach(), *torch.autograd.grad(truth.sum(), leaf)]
    rows = LossRows(z, target, losses, LossSettings(), gradient=True)

    def run(backend: str) -> list[torch.Tensor]:
        find_backend(backend).row_loss(rows)
        return [losses, z]

    our_calls = {name: partial(run, name) for name in ("torch", "triton")}
    copy = {"copy": partial(torch.empty_like(z).copy_, z.clone())}
    work = dict.fromkeys(our_calls, 2 * z.nbytes + target.nbytes + losses.nbytes)
    # The gradient replaces the logits, so each call needs them again.
    restore = partial(z.copy_, leaf.detach())
    seconds, failures = _timed(form, device, truths, our_calls, copy, restore)
    return _row(form, seconds, work | {"copy": 2 * z.nbytes}, failures, "triton", "triton")


def _row(
    form: Form, seconds: dict, work: dict, failures: dict, default: str, best: str, tried: int = 1
) -> dict:
    """``work``: the FLOPs or bytes of each call."""
    return {
        "table": "calls", "id": form.id, "seconds": seconds,
        "rates": {name: digits(work[name] / seconds[name] / 1e12) for name in seconds},
        "tried": tried, "failures": dict([*failures.items()][:_KEPT]),
        "default": default, "best": best,
    }  # fmt: skip


def _timed(
    form: Form, device: torch.device, truth: Sequence[torch.Tensor],
    our_calls: dict[str, Callable], torch_calls: dict[str, Callable],
    restore: Callable = lambda: None,
) -> tuple:  # fmt: skip
    """(the median seconds of each correct call, the error of each failed one of our calls).

    ``restore`` writes the inputs that a call overwrites.
    """
    calls, failures = dict(torch_calls), {}
    for name, call in our_calls.items():
        # So the log names the call that kills a process.
        print(f"{form.id}: {name}", file=sys.stderr)
        try:
            for tensor in call():
                tensor.fill_(float("nan"))  # so elements that no kernel writes fail the check
            restore()
            checked(zip(call(), truth, strict=True), TOLERANCE[form.dtype])
            calls[name] = call
        except Exception:
            failures[name] = last_error()
            wait_for(device)  # raises if the device is lost, and ends the run
    seconds = medians(clock_for(device), calls, _ROUNDS if device.type == "cuda" else 1)
    return {name: digits(each) for name, each in seconds.items()}, failures


def _compile(form: Form, target: Target, config: Config) -> None:
    """Compile the launches of a form without running them, on tensors of the device "meta"."""
    with use_target(target), intercept(Launch.compile):
        Operands(form, "meta").run(config)


def compile_ahead(
    pool: Executor | None, seconds: float, compiles: Callable, arguments: Sequence
) -> dict:
    """Call ``compiles`` with each entry of ``arguments``, in the processes of ``pool``.

    Returns the error, or "", of each entry whose call ended within ``seconds``.
    """
    futures = {pool.submit(compiles, *each): each for each in arguments} if pool else {}
    done, late = wait(futures, timeout=seconds)
    for future in late:
        future.cancel()
    return {futures[each]: repr(each.exception()) if each.exception() else "" for each in done}
