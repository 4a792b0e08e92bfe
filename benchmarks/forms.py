"""The launcher calls of a step, as jobs that take any config: to tune, or on meta to compile."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.backends.dropout import dropout_mask
from fastlora.kernels import (
    gemm_lowrank,
    one_launch_pays,
    one_pass_pays,
    project,
    weight_grad,
)
from fastlora.kernels.config import Call, Config
from fastlora.ops.functional import draw_seed

from ..shapes import Case
from .candidates import make_inputs
from .cases import DECODE

_PRECISION = "ieee"  # as the backend has it for bfloat16
_FACTOR = 2.0


@dataclass(frozen=True)
class Job:
    """One launcher call.  ``run`` fills ``outs`` (or returns them); ``expected`` is the oracle's.

    ``in_place``: the same result by torch's product and the adapter added; ``depth``: its K.
    """

    form: str
    kernel: str
    call: Call
    run: Callable[[Config | None], list[Tensor]]
    expected: Callable[[], list[Tensor]]
    in_place: Callable[[], Tensor] | None = None
    depth: int = 0

    @property
    def name(self) -> str:
        call = self.call
        words = [self.form, f"m{call.m}", f"n{call.n}", f"k{self.depth}" * (self.depth > 0)]
        words += [f"r{call.r}", f"x{call.projections}" * (call.projections > 1)]
        return " ".join(filter(None, [*words, "masked" * call.masked]))


def forms_of(case: Case) -> list[str]:
    """The products with the base weight first: they take most of the time, and make plans."""
    ys = [f"y{i}" for i, N in enumerate(case.outputs) if N not in case.outputs[:i]]
    return [*ys, "h"] if case.M <= DECODE else [*ys, "dx", "dB,dh", "dA", "h"]


def make_job(case: Case, form: str, device: torch.device) -> Job:
    inputs = make_inputs(case, device, 0)
    M, K, r, n = case.M, case.K, case.r, len(case.outputs)
    x, dys = inputs.x.detach(), inputs.dys
    weights = [weight.detach() for weight in inputs.weights]
    pairs = inputs.adapters[case.dtype]
    lora_as, lora_bs = [a.detach() for a, _ in pairs], [b.detach() for _, b in pairs]
    thin = [torch.randn(M, r, device=device).to(case.dtype) for _ in pairs]  # an h, a dh
    masked = case.dropout > 0
    seeds = draw_seed(n, device) if masked else None
    shared = {"precision": _PRECISION}
    dropped = shared | {"dropout": case.dropout, "seeds": seeds}

    def call(columns: int, projections: int, masked: bool, project: bool = False) -> Call:
        return Call(
            M, columns, r, case.dtype.itemsize, _PRECISION, projections, masked, project
        )  # fmt: skip

    def kept(product: Tensor, i: int) -> Tensor:
        return product * dropout_mask(seeds[i], (M, K), case.dropout) if masked else product

    if form.startswith("y"):
        i = int(form[1:])
        weight, h, b = weights[i], thin[i], lora_bs[i]
        y, a = x.new_empty(M, len(weight)), lora_as[i].T
        makes_h = not masked and one_launch_pays(x, r)  # as the backend asks

        def run_y(config):
            options = shared | ({"a": a, "factor": _FACTOR} if makes_h else {})
            gemm_lowrank(y, [x], [weight.T], [h], [b.T], config=config, **options)
            return [y, h] if makes_h else [y]

        def y_in_place():
            made = project(x, [a], [_FACTOR], **shared)[0] if makes_h else h
            torch.mm(x, weight.T, out=y)
            gemm_lowrank(y, [], [], [made], [b.T], add=True, **shared)
            return y

        def y_expected():
            exact = _FACTOR * x.double() @ a.double() if makes_h else h.double()
            y = x.double() @ weight.double().T + exact @ b.double().T
            return [y, exact] if makes_h else [y]

        return Job(
            "y,h" if makes_h else "y", "gemm_lowrank", call(len(weight), 1, False, makes_h),
            run_y, y_expected, y_in_place, K,
        )  # fmt: skip
    if form == "dx":
        dx = x.new_empty(M, K)

        def run_dx(config):
            gemm_lowrank(dx, dys, weights, thin, lora_as, config=config, **dropped)
            return [dx]

        def dx_in_place():
            for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
                torch.addmm(dx, dy, weight, beta=float(i > 0), out=dx)
            gemm_lowrank(dx, [], [], thin, lora_as, add=True, **dropped)
            return dx

        def dx_expected():
            parts = enumerate(zip(dys, weights, thin, lora_as, strict=True))
            return [
                sum(
                    dy.double() @ weight.double() + kept(dh.double() @ a.double(), i)
                    for i, (dy, weight, dh, a) in parts
                )
            ]

        depth = sum(case.outputs)
        return Job(
            "dx", "gemm_lowrank", call(K, n, masked), run_dx, dx_expected, dx_in_place, depth
        )
    if form == "dB,dh":
        dy, h, b = dys[0], thin[0], lora_bs[0]
        d_b = torch.empty_like(b)
        one_pass = one_pass_pays(dy, b, _PRECISION)

        def run_d_b(config):
            options = shared | ({"b": b, "factor": _FACTOR} if one_pass else {})
            dh = weight_grad(dy, [h], [d_b], config=config, **options)
            return [d_b, dh] if one_pass else [d_b]

        def d_b_expected():
            dh = [_FACTOR * dy.double() @ b.double()] if one_pass else []
            return [dy.double().T @ h.double(), *dh]

        name = form if one_pass else "dB"
        return Job(
            name, "weight_grad", call(dy.shape[1], 1, False, one_pass), run_d_b, d_b_expected
        )
    if form == "dA":
        d_as = [torch.empty_like(a) for a in lora_as]

        def run_d_a(config):
            weight_grad(x, thin, [d_a.T for d_a in d_as], config=config, **dropped)
            return d_as

        return Job(
            form, "weight_grad", call(K, n, masked), run_d_a,
            lambda: [dh.double().T @ kept(x.double(), i) for i, dh in enumerate(thin)],
        )  # fmt: skip
    factors = [_FACTOR] * n
    return Job(
        form, "project", call(K, n, masked),
        lambda config: project(x, [a.T for a in lora_as], factors, config=config, **dropped),
        lambda: [_FACTOR * kept(x.double(), i) @ a.double().T for i, a in enumerate(lora_as)],
    )  # fmt: skip
