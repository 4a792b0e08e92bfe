"""Linear layers by the Triton kernels: one x, and the outputs of a group.

    h  = factor · (mask ∘ x) lora_aᵀ       y  = x weightᵀ + h lora_bᵀ + bias
    dh = factor · dy lora_b                dx = Σ dy weight + Σ mask ∘ (dh lora_a)
    d lora_a = dhᵀ (mask ∘ x)              d lora_b = dyᵀ h

factor = scale / (1 - p), with dropout's probability p.  The sums of dx run over the outputs and
their adapters.  The launchers are in kernels/: ``project`` computes h or dh, ``gemm_lowrank`` y or
dx in one launch ("fused"), ``lowrank`` only its low-rank term (plans "in place"), and
``weight_grad`` d lora_a or d lora_b.

``_forward`` and ``_backward`` are captured once for each kind of call and replayed later.  So they
consist of torch operations and launches, and never read a tensor's elements on the host.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...call.projection import Adapter, Layout, Output, flatten, packed_of, per_adapter, unflatten
from ...call.rows import Rows
from ...formats.format import product_of
from .. import torch as torch_backend
from ..formula import base_gradients, no_gradients
from ..protocol import BackwardCall, Call
from .packed import is_unpackable, made_dense, needs_torch, of_dense, read_by, rounded
from .supported import covers, empty_gradients, empty_like, kernels, precision_of
from .verification import KernelFunction, run_kernels


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """Every output's y [M, N], and every adapter's h [M, r], as the torch backend returns them."""
    x, count = inputs[0], len(call.layouts)
    if needs_torch(call.layouts):
        inputs, call = made_dense(inputs, call)
    settings = call.layouts, call.dropout, precision_of(x)
    # None: the place of the ends, which only experts have (grouped.py).
    results = run_kernels(FORWARD, [*inputs, None, seeds], settings, call.captured)
    return results[:count], results[count:]


def backward(given: BackwardCall) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None, as the torch backend returns them."""
    dys, inputs, hs, needs, seeds, call = given
    if needs_torch(call.layouts):
        return of_dense(backward, given)
    if all([dy is None for dy in dys]):
        return torch_backend.backward(given)
    settings = call.layouts, call.dropout, precision_of(inputs[0]), tuple(needs)
    return run_kernels(BACKWARD, [*inputs, None, seeds, *hs, *dys], settings)


class Common(NamedTuple):
    """Arguments that all kernels of a call share."""

    dropout: float
    precision: str
    seeds: Tensor | None

    def factor(self, adapter: Adapter[Tensor]) -> float:
        """The factor of h and dh: the adapter's scale, with dropout's 1 / (1 - p)."""
        return float(adapter.scale) / (1.0 - self.dropout)


def _forward(
    tensors: Sequence[Tensor], layouts: Sequence[Layout], dropout: float, precision: str
) -> list[Tensor]:
    """Every y, then every h.

    One launch of ``project`` reads x once and computes h for all adapters of the group.  Then each
    output's plan says how y is computed (``_y``).  With few rows and no dropout, there is no
    ``project``: the launch that computes y also computes h.  If an output has 8-bit products, x is
    rounded to 8 bits, once for the group.
    """
    x, *flat, _, seeds = tensors
    outputs, common = unflatten(flat, layouts), Common(dropout, precision, seeds)
    plans = [_forward_plan(x, output, common) for output in outputs]
    in_8_bits = any([product_of(output.base.weight) == "int8" for output in outputs])
    codes_of_x = rounded(x, precision) if in_8_bits else None
    # For all outputs or for none: if one output needs ``project``, then that launch computes the h
    # of all outputs from one read of x.
    in_one_launch = (
        seeds is None
        and codes_of_x is None
        and all(
            plan.fused
            and len(output.adapters) == 1
            and kernels.one_launch_pays(x, len(output.adapters[0].lora_a))
            for plan, output in zip(plans, outputs, strict=True)
            if plan is not None
        )
    )
    adapters = [adapter for output in outputs for adapter in output.adapters]
    if in_one_launch:  # uninitialized; ``_y`` fills each h
        hs = [x.new_empty(len(x), len(adapter.lora_a)) for adapter in adapters]
    else:
        factors = [common.factor(adapter) for adapter in adapters]
        lora_as = [adapter.lora_a.T for adapter in adapters]
        hs = kernels.project(x, lora_as, factors, **common._asdict()) if adapters else []
    ys = [
        _y(x, output, own_hs, plan, in_one_launch, precision, codes_of_x)
        for output, own_hs, plan in zip(outputs, per_adapter(hs, outputs), plans, strict=True)
    ]
    return ys + hs


def _backward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    needs_flat: Sequence[bool],
) -> list[Tensor | None]:
    """dx, then the gradients of the outputs' tensors as a flat list.

    The launches follow each other on one stream, in this order:

    1. For each output: torch computes d weight and d bias if they train.  For each of its adapters,
       ``through_lora_b`` reads dy and computes d lora_b and dh: one pass of ``weight_grad`` for
       both where that costs fewer bytes, otherwise ``weight_grad`` and ``project``.
    2. ``_dx``, once for the whole group: dx = Σ dy weight + Σ mask ∘ (dh lora_a), with step 1's dh.
       Fused, it is one launch.  In place, the adapters' part is one launch, to which torch adds one
       product for each output.  With few rows that first launch also computes every d lora_a.
    3. ``_d_lora_a``, unless step 2 computed it: one launch reads x once for all adapters.

    Each of these launches may be followed by one of ``sum_planes``, which adds its partial sums.
    """
    needs_x, *rest = needs_flat
    (x, *flat), (_, seeds, *saved) = tensors[: len(needs_flat)], tensors[len(needs_flat) :]
    common, needs = Common(dropout, precision, seeds), unflatten(rest, layouts)
    # After the ends (of experts, here None) and the seeds: one h for each adapter, one dy for each
    # output.
    hs, dys = saved[: -len(layouts)], saved[-len(layouts) :]
    outputs = unflatten(flat, layouts)
    all_rounded: list[_Rounded] = []  # for each output with 8-bit products
    gradients: list[Output[Tensor | None]] = []
    terms: list[_Term] = []
    # One seed for each adapter, as for hs.
    seed_of_each = [None] * len(hs) if seeds is None else seeds.split(1)
    own_hs, own_seeds = per_adapter(hs, outputs), per_adapter(seed_of_each, outputs)
    for dy, output, need, *of_adapters in zip(dys, outputs, needs, own_hs, own_seeds, strict=True):
        if dy is None:  # this output isn't part of the loss
            gradients.append(no_gradients(output))
            continue
        base = base_gradients(dy, x, output.base, need.base)
        # dx of 8-bit products: dy weight = (dy ∘ scale) codes, and dy ∘ scale is rounded to 8 bits.
        if needs_x and product_of(output.base.weight) == "int8":
            codes, scale = packed_of(output)
            all_rounded.append(_Rounded(*rounded(dy, precision, scale), codes))
        adapters = []
        for adapter, wanted, h, seed in zip(
            output.adapters, need.adapters, *of_adapters, strict=True
        ):
            d_adapter = empty_gradients(adapter, wanted)
            needs_dh = needs_x or wanted.lora_a  # dx and d lora_a both need dh
            factor, options = common.factor(adapter), {"precision": precision}
            dh = through_lora_b(dy, adapter.lora_b, h, d_adapter.lora_b, factor, needs_dh, options)
            adapters.append(d_adapter)
            terms += [] if dh is None else [_Term(adapter, dh, d_adapter.lora_a, seed)]
        gradients.append(Output(base, tuple(adapters)))
    # Every dh exists now.  dx sums over the outputs, and x is read once for all d lora_a.
    trained = [term for term in terms if term.d_lora_a is not None]
    dx, is_filled = None, False
    if needs_x:
        dx, is_filled = _dx(x, dys, outputs, terms, common, all_rounded)
    if trained and not is_filled:
        _d_lora_a(x, trained, common)
    return [dx, *flatten(gradients, layouts)]


def _by_torch(
    tensors: Sequence[Tensor], layouts: tuple[Layout, ...], dropout: float, *settings: Any
) -> list[Tensor]:
    # The same arguments and results as _forward.
    *inputs, ends, seeds = tensors
    ys, hs = torch_backend.forward(inputs, seeds, _torch_call(layouts, dropout, ends))
    return ys + hs


def _backward_by_torch(
    tensors: Sequence[Tensor], layouts: tuple[Layout, ...], dropout: float, *settings: Any
) -> list[Tensor | None]:
    # The same arguments and results as _backward.
    needs = settings[-1]
    inputs, (ends, seeds, *saved) = tensors[: len(needs)], tensors[len(needs) :]
    hs, dys = saved[: -len(layouts)], saved[-len(layouts) :]
    call = _torch_call(layouts, dropout, ends)
    return torch_backend.backward(BackwardCall(dys, inputs, hs, needs, seeds, call))


def _torch_call(layouts: tuple[Layout, ...], dropout: float, ends: Tensor | None) -> Call:
    return Call(layouts, dropout, torch_backend, None if ends is None else Rows(ends))


# grouped.py replaces ``run`` of these two by the kernels for experts.
FORWARD = KernelFunction(_forward, _by_torch, covers, has_layouts=True)
BACKWARD = KernelFunction(_backward, _backward_by_torch, covers, has_layouts=True)


class _Term(NamedTuple):
    """An adapter with its dh, from which its part of dx and its d lora_a are computed."""

    adapter: Adapter[Tensor]
    dh: Tensor
    d_lora_a: Tensor | None  # empty, to be filled; None if lora_a doesn't train
    seed: Tensor | None


class _Rounded(NamedTuple):
    """An output's dy, rounded to 8 bits with a scale for each row, and its weight's codes."""

    codes: Tensor
    scales: Tensor
    of_weight: Tensor


def _forward_plan(x: Tensor, output: Output[Tensor], common: Common) -> "kernels.Plan | None":
    """The plan of an output; None if it has no adapter and no 8-bit product: torch computes y."""
    if product_of(output.base.weight) == "int8":
        return kernels.plan.FUSED
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
    codes_of_x: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """x weightᵀ + Σ h lora_bᵀ + bias, [M, N].  ``makes_h``: the same launch also fills h [M, r]."""
    (weight, bias), adapters = output
    if plan is None:
        return linear(x, read_by(weight, x), None if bias is None else bias.to(x.dtype))
    y, v = x.new_empty(len(x), weight.shape[0]), [adapter.lora_b.T for adapter in adapters]
    if plan.fused:
        options: dict[str, Any] = {"precision": precision, "bias": bias}
        if codes_of_x is not None and product_of(weight) == "int8":
            (p, of_rows), (q, of_columns) = codes_of_x, packed_of(output)
            kernels.gemm_int8_lowrank(y, [p], [q.mT], hs, v, [of_rows], of_columns, **options)
            return y
        q = read_by(weight, x, plan.unpacks and is_unpackable([weight])).mT
        options["preferred"] = plan.gemm
        if makes_h:
            (adapter,), (h,), (lora_b_t,) = adapters, hs, v
            a, factor = adapter.lora_a.T, float(adapter.scale)  # this launch runs without dropout
            kernels.gemm_lowrank_few_rows(y, x, q, a, h, lora_b_t, factor, **options)
        else:
            kernels.gemm_lowrank(y, [x], [q], hs, v, **options)
        return y
    # The order: y = h lora_bᵀ + bias, then y += x weightᵀ.  torch's addmm (beta = 1) reads y only
    # in its epilogue, after its main loop, so the addition costs little.
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
    """Fill d lora_b = dyᵀ h, unless it is None; return dh = factor · dy lora_b if it is needed.

    Both need dy.  If one pass over dy costs fewer bytes than two, one launch computes both.
    """
    dh = None
    if d_lora_b is not None:
        assert h is not None
        also: dict[str, Any] = {}
        # With an order, the kernels read only as many rows of dy as there are sorted rows (of h).
        rows = dy if options.get("order") is None else dy[: len(h)]
        if needs_dh and kernels.one_pass_pays(rows, lora_b, options["precision"]):
            also = {"b": lora_b, "factor": factor}
        # A hook on saved tensors (offloading, compression) may have changed the strides of h.
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
    all_rounded: "Sequence[_Rounded]",
) -> tuple[Tensor, bool]:
    """(dx, is_filled): dx = Σ dy weight + Σ mask ∘ (dh lora_a), [M, K].

    ``is_filled``: every d lora_a was computed by the same launch as the adapters' part of dx.
    ``all_rounded``: an entry for each output with 8-bit products.
    """
    dx, is_filled = empty_like(x), False
    used = [(dy, output) for dy, output in zip(dys, outputs, strict=True) if dy is not None]
    # The outputs whose dy weight torch computes.  A fused launch below takes some of them, or all.
    by_torch = used
    u, v = [term.dh for term in terms], [term.adapter.lora_a for term in terms]
    seeds = _join([term.seed for term in terms], common.seeds) if terms else None
    options = common._replace(seeds=seeds)._asdict()
    if all_rounded:  # one launch: all 8-bit products, and all dh lora_a
        by_torch = [pair for pair in used if product_of(pair[1].base.weight) == "dense"]
        ps, qs = [each.codes for each in all_rounded], [each.of_weight for each in all_rounded]
        if kernels.target_of(x.device).turns_int8:
            # This device loads int8 fast only if the codes are contiguous along the summed axis.
            # So the codes are transposed in each call.  By an estimate, that takes less time than
            # loads of single bytes from 2048 rows on.  A second copy of the weight would need no
            # transposition, but its memory stays allocated between calls.
            qs = [codes.mT.contiguous().mT for codes in qs]
        scales = [each.scales for each in all_rounded]
        kernels.gemm_int8_lowrank(dx, ps, qs, u, v, scales, **options)
    elif terms:
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
        # A fused launch reads all weights at once.  If it can't read packed weights, the dense
        # copies of all of them would be in memory.  torch's products need one copy at a time.
        are_plain = all([isinstance(weight, Tensor) for weight in weights])
        if plan.fused and (unpacks or len(weights) == 1 or are_plain):
            by_torch = [pair for pair in used if not pair[1].adapters]
            ps, qs = [dy for dy, _ in adapted], [read_by(w, x, unpacks) for w in weights]
            # One launch: dy weight of all adapted outputs, and all dh lora_a.
            kernels.gemm_lowrank(dx, ps, qs, u, v, preferred=plan.gemm, **options)
        # Not fused: dx = Σ mask ∘ (dh lora_a) first.  Here one launch of weight_grad reads x once
        # and also computes every d lora_a.
        elif all([term.d_lora_a is not None for term in terms]) and kernels.low_rank_pays(
            x, ranks, common.precision, masked
        ):
            _d_lora_a(x, terms, common, dx)
            is_filled = True
        else:  # not fused, and the launch computes no d lora_a
            kernels.lowrank(dx, u, v, **options)
    # torch adds the other products, one launch for each output.  The first one overwrites dx (with
    # beta 0) if nothing was written to it.
    beta = float(bool(all_rounded or terms))
    for dy, output in by_torch:
        torch.addmm(dx, dy, read_by(output.base.weight, x), beta=beta, out=dx)
        beta = 1.0
    return dx, is_filled


def _d_lora_a(
    x: Tensor, terms: Sequence[_Term], common: Common, low_rank: Tensor | None = None
) -> None:
    """Fill every d lora_a with dhᵀ (mask ∘ x), and ``low_rank`` with Σ mask ∘ (dh lora_a).

    One launch for up to four adapters; it reads x once.
    """
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


def _join(own_seeds: Sequence[Tensor | None], seeds: Tensor | None) -> Tensor | None:
    """The seeds that aren't None as one tensor; ``seeds`` itself if that has all of them.

    Indexing ``seeds`` would need an index tensor, which the host would have to copy to the device.
    """
    if seeds is None or len(own_seeds) == len(seeds):
        return seeds
    return torch.cat([seed for seed in own_seeds if seed is not None])
