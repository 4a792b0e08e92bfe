"""Linear layers by the Triton kernels: one x, and the outputs of a group."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...projection import Adapter, Layout, Output, flatten, per_adapter, unflatten
from .. import torch as torch_backend
from ..protocol import Call
from .cover import covers, empty_like, kernels, precision_of
from .packed import is_unpackable, made_dense, needs_torch, of_dense, read_by
from .verification import State, run_kernels


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Any], list[Any]] | State:
    """As the torch backend's: y [M, N] of every output, and h [M, r] of every adapter."""
    x, count = inputs[0], len(call.layouts)
    if needs_torch(call.layouts):
        inputs, call = made_dense(inputs, call)
    made = run_kernels(
        _forward,
        [seeds, *inputs],
        (call.layouts, call.dropout, precision_of(x)),
        lambda: covers(inputs, call.layouts),
        call.captured,
    )
    if isinstance(made, State):
        return made
    return made[:count], made[count:]


def backward(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: Call,
) -> list[Tensor | None] | State:
    """As the torch backend's: the gradient of each input that needs one, else None."""
    x = inputs[0]
    if needs_torch(call.layouts):
        return of_dense(backward, dys, inputs, hs, needs, seeds, call)
    return run_kernels(
        _backward,
        [seeds, *inputs, *hs, *dys],
        (call.layouts, call.dropout, precision_of(x), tuple(needs)),
        lambda: any(dy is not None for dy in dys) and covers(inputs, call.layouts, dys),
    )


class Common(NamedTuple):
    """What all kernels of a call take."""

    dropout: float
    precision: str
    seeds: Tensor | None

    def factor(self, adapter: Adapter[Tensor]) -> float:
        return float(adapter.scale) / (1.0 - self.dropout)


def _forward(
    tensors: Sequence[Tensor], layouts: Sequence[Layout], dropout: float, precision: str
) -> list[Tensor]:
    """Every y, then every h."""
    seeds, x, *flat = tensors
    outputs, common = unflatten(flat, layouts), Common(dropout, precision, seeds)
    plans = [_forward_plan(x, output, common) for output in outputs]
    in_one_launch = seeds is None and all(
        plan.fused
        and len(output.adapters) == 1
        and kernels.one_launch_pays(x, len(output.adapters[0].lora_a))
        for plan, output in zip(plans, outputs, strict=True)
        if plan is not None
    )
    adapters = [adapter for output in outputs for adapter in output.adapters]
    if in_one_launch:
        hs = [x.new_empty(len(x), len(adapter.lora_a)) for adapter in adapters]
    else:
        factors = [common.factor(adapter) for adapter in adapters]
        hs = kernels.project(x, [a.lora_a.T for a in adapters], factors, **common._asdict())
    ys = [
        _y(x, output, thin, plan, in_one_launch, precision)
        for output, thin, plan in zip(outputs, per_adapter(hs, outputs), plans, strict=True)
    ]
    return ys + hs


def _backward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    needs_flat: Sequence[bool],
) -> list[Tensor | None]:
    """dx, then the gradients of the outputs' tensors, laid flat."""
    needs_x, *rest = needs_flat
    seeds, x, *others = tensors
    common, needs = Common(dropout, precision, seeds), unflatten(rest, layouts)
    flat, others = others[: len(rest)], others[len(rest) :]
    hs, dys = others[: -len(layouts)], others[-len(layouts) :]
    outputs = unflatten(flat, layouts)
    gradients: list[Output[Tensor | None]] = []
    terms: list[_Term] = []
    per_output = zip(
        dys, outputs, needs, per_adapter(hs, outputs), _seeds(outputs, seeds), strict=True
    )
    for dy, output, need, thin, own_seeds in per_output:
        if dy is None:
            gradients.append(torch_backend.no_gradients(output))
            continue
        base = torch_backend.base_gradients(dy, x, output.base, need.base)
        adapters = []
        for of_one in zip(output.adapters, need.adapters, thin, own_seeds, strict=True):
            adapter, wanted, h, seed = of_one
            d_adapter = Adapter(
                empty_like(adapter.lora_a) if wanted.lora_a else None,
                empty_like(adapter.lora_b) if wanted.lora_b else None,
            )
            needs_dh, factor = needs_x or wanted.lora_a, common.factor(adapter)
            dh = through_lora_b(
                dy, adapter.lora_b, h, d_adapter.lora_b, factor, needs_dh, {"precision": precision}
            )
            adapters.append(d_adapter)
            terms += [] if dh is None else [_Term(adapter, dh, d_adapter.lora_a, seed)]
        gradients.append(Output(base, tuple(adapters)))
    trained = [term for term in terms if term.d_lora_a is not None]
    dx, is_filled = _dx(x, dys, outputs, terms, common) if needs_x else (None, False)
    if trained and not is_filled:
        _d_lora_a(x, trained, common)
    return [dx, *flatten(gradients, layouts)]


class _Term(NamedTuple):
    """An adapter's dh, and what will be made with it: its part of dx, and d lora_a."""

    adapter: Adapter[Tensor]
    dh: Tensor
    d_lora_a: Tensor | None  # to be filled
    seed: Tensor | None


def _forward_plan(x: Tensor, output: Output[Tensor], common: Common) -> "kernels.Plan | None":
    """How to make this output; None for one without adapters, whose product is torch's."""
    if not output.adapters:
        return None
    ranks = [len(adapter.lora_a) for adapter in output.adapters]
    rows, masked = output.base.weight.shape[0], common.seeds is not None
    packed = is_unpackable([output.base.weight])
    return kernels.plan_for(
        x, rows, x.shape[1], ranks, common.precision, masked=masked, packed=packed
    )


def _y(
    x: Tensor,
    output: Output[Tensor],
    hs: list[Tensor],
    plan: "kernels.Plan | None",
    makes_h: bool,
    precision: str,
) -> Tensor:
    """x weightᵀ + Σ h lora_bᵀ + bias, [M, N]; ``makes_h``: fill h [M, r] in the same launch."""
    (weight, bias), adapters = output
    if plan is None:
        return linear(x, read_by(weight, x), None if bias is None else bias.to(x.dtype))
    y, v = x.new_empty(len(x), weight.shape[0]), [adapter.lora_b.T for adapter in adapters]
    if plan.fused:
        unpacks = plan.unpacks and is_unpackable([weight])
        a, factor = None, 1.0
        if makes_h:
            a, factor = adapters[0].lora_a.T, float(adapters[0].scale)
        kernels.gemm_lowrank(
            y, [x], [read_by(weight, x, unpacks).mT], hs, v, precision=precision, bias=bias,
            a=a, factor=factor, preferred=plan.gemm,
        )  # fmt: skip
        return y
    # The adapter first: torch's product adds to what it finds, behind its own loads.
    kernels.lowrank(y, hs, v, precision=precision, bias=bias)
    return torch.addmm(y, x, read_by(weight, x).mT, out=y)


def through_lora_b(
    dy: Tensor,
    lora_b: Tensor,
    h: Tensor | None,
    d_lora_b: Tensor | None,
    factor: float,
    needs_dh: bool,
    options: dict[str, Any],
) -> Tensor | None:
    """d lora_b is filled, if it is there; dh, if it is needed: both from one reading of dy."""
    dh = None
    if d_lora_b is not None:
        assert h is not None
        also: dict[str, Any] = {}
        rows = dy if options.get("order") is None else dy[: len(h)]
        if needs_dh and kernels.one_pass_pays(rows, lora_b, options["precision"]):
            also = {"b": lora_b, "factor": factor}
        # A hook on saved tensors may give h back in another layout.
        dh = kernels.weight_grad(dy, [h.contiguous()], [d_lora_b], **also, **options)
    if needs_dh and dh is None:
        (dh,) = kernels.project(dy, [lora_b], [factor], **options)
    return dh


def _dx(
    x: Tensor,
    dys: Sequence[Tensor | None],
    outputs: Sequence[Output[Tensor]],
    terms: Sequence[_Term],
    common: Common,
) -> tuple[Tensor, bool]:
    """Σ dy weight + Σ mask ∘ (dh lora_a), [M, K]; and whether every d lora_a was filled as well."""
    is_filled = False
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    used = [(dy, output) for dy, output in zip(dys, outputs, strict=True) if dy is not None]
    fused: list = []
    if terms:
        u, v = [term.dh for term in terms], [term.adapter.lora_a for term in terms]
        seeds = _join([term.seed for term in terms], common.seeds)
        adapted = [(dy, output.base.weight) for dy, output in used if output.adapters]
        weights = [weight for _, weight in adapted]
        unpackable = is_unpackable(weights)
        depth = sum(output.base.weight.shape[0] for _, output in used)
        ranks, masked = [dh.shape[1] for dh in u], seeds is not None
        plan = kernels.plan_for(
            x, x.shape[1], depth, ranks, common.precision,
            masked=masked, backward=True, packed=unpackable,
        )  # fmt: skip
        unpacks = plan.unpacks and unpackable
        # Of weights that are made dense for it, one at a time is in memory.
        are_plain = all([isinstance(weight, Tensor) for weight in weights])
        if plan.fused and (unpacks or len(weights) == 1 or are_plain):
            fused = adapted
        options = common._replace(seeds=seeds)._asdict()
        if fused:
            ps, qs = [dy for dy, _ in fused], [read_by(w, x, unpacks) for _, w in fused]
            kernels.gemm_lowrank(dx, ps, qs, u, v, preferred=plan.gemm, **options)
        elif all([term.d_lora_a is not None for term in terms]) and kernels.low_rank_pays(
            x, ranks, common.precision, masked
        ):
            _d_lora_a(x, terms, common, dx)
            is_filled = True
        else:  # first, as in the forward
            kernels.lowrank(dx, u, v, **options)
    by_torch = [(dy, output.base.weight) for dy, output in used if not (fused and output.adapters)]
    for i, (dy, weight) in enumerate(by_torch):
        torch.addmm(dx, dy, read_by(weight, x), beta=float(bool(terms) or i > 0), out=dx)
    return dx, is_filled


def _d_lora_a(
    x: Tensor, terms: Sequence[_Term], common: Common, low_rank: Tensor | None = None
) -> None:
    """dhᵀ (mask ∘ x) into every d lora_a; and Σ mask ∘ (dh lora_a) into ``low_rank``, if given."""
    kernels.weight_grad(
        x,
        [term.dh for term in terms],
        [term.d_lora_a.T for term in terms if term.d_lora_a is not None],
        precision=common.precision,
        dropout=common.dropout,
        seeds=_join([term.seed for term in terms], common.seeds),
        vs=[] if low_rank is None else [term.adapter.lora_a.T for term in terms],
        low_rank=low_rank,
    )


def _seeds(outputs: Sequence[Output], seeds: Tensor | None) -> Sequence[list[Tensor | None]]:
    """For each output its adapters' seeds, or None for each without dropout."""
    if seeds is None:
        return [[None] * len(output.adapters) for output in outputs]
    return per_adapter(seeds.split(1), outputs)


def _join(some: Sequence[Tensor | None], seeds: Tensor | None) -> Tensor | None:
    """These of the call's seeds as one tensor; no index is sent to the device for it."""
    if seeds is None or len(some) == len(seeds):
        return seeds
    return torch.cat([seed for seed in some if seed is not None])
