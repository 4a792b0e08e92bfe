"""The Triton backend: the kernels of ``fastlora.kernels``, on a GPU, or interpreted on a CPU.

The formulas are those of the torch backend, and so is the dropout mask, bit for bit.  A call that
the kernels don't cover runs on the torch backend, and the reason is said once.
"""

import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..projection import Projection, outputs_of
from . import torch as torch_backend
from .dropout import dropout_mask

try:
    from .. import kernels  # type: ignore[attr-defined]  # it lives in kernels/
except ImportError as error:
    raise ImportError(
        f"{__package__.partition('.')[0]} was imported from a source tree, {__file__}, which "
        "has no fastlora.kernels: run from another folder, or pip install --editable ."
    ) from error

__all__ = ["backward", "dropout_mask", "forward", "why_not"]

_COVERED = (torch.float16, torch.bfloat16, torch.float32)
_LONGEST = 2**31 - 2**17  # an index and a few tiles more fit in 32 bits
_said: set[str] = set()
_INTERNAL = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def forward(
    x: Tensor, projections: Sequence[Projection], *, dropout: float, seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """As the torch backend's: the outputs [M, N] and the h [M, r] of x [M, K]."""
    if not _covers(x, projections):
        return torch_backend.forward(x, projections, dropout=dropout, seed=seed)
    precision, (rows, depth) = _precision(x), x.shape
    with _current(x.device):
        layers = _layers(projections)
        plans = [
            kernels.plan_for(
                x, len(adapters[0].weight), depth, [len(a.lora_a) for a in adapters], precision
            )
            for adapters in layers
        ]
        makes_h = seed is None and all(
            plan.fused and len(adapters) == 1
            and kernels.one_launch_pays(x, len(adapters[0].lora_a))
            for plan, adapters in zip(plans, layers, strict=True)
        )  # fmt: skip
        if makes_h:
            hs = [x.new_empty(rows, len(projection.lora_a)) for projection in projections]
        else:
            hs = kernels.project(
                x,
                [projection.lora_a.T for projection in projections],
                [_factor(projection, dropout) for projection in projections],
                precision=precision,
                dropout=dropout,
                seeds=seed,
            )
        ys, h_of_next = [], iter(hs)
        for adapters, plan in zip(layers, plans, strict=True):
            weight, lora_a, _, bias, scale = adapters[0]
            u = [next(h_of_next) for _ in adapters]
            v = [adapter.lora_b.T for adapter in adapters]
            if plan.fused:
                y = x.new_empty(rows, len(weight))
                kernels.gemm_lowrank(
                    y, [x], [weight.T], u, v, precision=precision, bias=bias,
                    a=lora_a.T if makes_h else None, factor=float(scale), preferred=plan.gemm,
                )  # fmt: skip
            else:
                y = linear(x, weight, None if bias is None else bias.to(x.dtype))
                kernels.gemm_lowrank(y, [], [], u, v, precision=precision, add=True)
            ys.append(y)
    return ys, hs


def backward(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    *,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor | None]:
    """As the torch backend's: the gradients of x and of each projection's tensors."""
    per_projection = enumerate([dys[i] for i in outputs_of(projections)])
    used = {i: dy for i, dy in per_projection if dy is not None}
    if not used or not _covers(x, projections):
        return torch_backend.backward(dys, x, projections, hs, needs, dropout=dropout, seed=seed)
    gradients: list[Tensor | None] = [None] * len(needs)
    dhs: dict[int, Tensor] = {}
    with _current(x.device):
        for i, dy in used.items():
            projection, d_lora_b = projections[i], None
            need_weight, need_a, need_b, need_bias = needs[1 + 4 * i : 5 + 4 * i]
            if need_weight:
                gradients[1 + 4 * i] = torch.mm(dy.T, x)
            if need_b:
                gradients[3 + 4 * i] = d_lora_b = _empty_like(projection.lora_b)
            if need_bias and projection.bias is not None:
                d_bias = dy.sum(0, dtype=torch.float32)
                gradients[4 + 4 * i] = d_bias.to(projection.bias.dtype)
            dh = _through_lora_b(dy, projection, hs[i], d_lora_b, needs[0] or need_a, dropout)
            if dh is not None:
                dhs[i] = dh
        if needs[0]:
            gradients[0] = _dx(x, used, projections, dhs, dropout, seed)
        trained = [i for i in used if needs[2 + 4 * i]]
        if trained:
            d_lora_as = [_empty_like(projections[i].lora_a) for i in trained]
            kernels.weight_grad(
                x,
                [dhs[i] for i in trained],
                [d_lora_a.T for d_lora_a in d_lora_as],
                precision=_precision(x),
                dropout=dropout,
                seeds=_seeds_of(trained, seed),
            )
            for i, d_lora_a in zip(trained, d_lora_as, strict=True):
                gradients[2 + 4 * i] = d_lora_a
    return gradients


def why_not(dtype: torch.dtype, device: torch.device, projections: Sequence[Projection]) -> str:
    """Why the kernels don't cover x of this dtype on this device, or an empty string."""
    target = kernels.target_of(device)
    if target is None:
        if device.type == "cpu":
            return "on a CPU the Triton kernels run only under TRITON_INTERPRET=1"
        return f"the Triton kernels don't run on {device}"
    for projection in projections:
        for tensor in projection[:4]:
            if tensor is not None and tensor.dtype not in _COVERED:
                return f"the Triton kernels don't have {tensor.dtype}"
            if tensor is not None and max(tensor.shape) > _LONGEST:
                return f"the Triton kernels count to {_LONGEST}, but a tensor is longer"
    if dtype == torch.float32 and not target.float32:
        return f"{target.name} multiplies no float32 in tensor cores"
    return "" if dtype in _COVERED else f"the Triton kernels don't have {dtype}"


def _covers(x: Tensor, projections: Sequence[Projection]) -> bool:
    if len(x) == 0:
        return False
    reason = why_not(x.dtype, x.device, projections)
    if not reason and len(x) > _LONGEST:
        reason = f"the Triton kernels count to {_LONGEST}, but x has {len(x)} rows"
    if reason and reason not in _said:
        _said.add(reason)
        warnings.warn(f"this call runs on the torch backend: {reason}", stacklevel=_user_level())
    return not reason


def _user_level() -> int:
    """The ``stacklevel``, for who calls this, of the first line outside of fastlora and torch."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    return level + 1


def _through_lora_b(
    dy: Tensor,
    projection: Projection,
    h: Tensor,
    d_lora_b: Tensor | None,
    need_dh: bool,
    dropout: float,
) -> Tensor | None:
    """dyᵀ h into d_lora_b, if there is one; return dh = factor · dy lora_b, if it is needed."""
    factor, precision, lora_b = _factor(projection, dropout), _precision(dy), projection.lora_b
    if d_lora_b is not None and need_dh and kernels.one_pass_pays(dy, lora_b, precision):
        return kernels.weight_grad(
            dy, [h], [d_lora_b], precision=precision, b=lora_b, factor=factor
        )
    if d_lora_b is not None:
        kernels.weight_grad(dy, [h], [d_lora_b], precision=precision)
    return kernels.project(dy, [lora_b], [factor], precision=precision)[0] if need_dh else None


def _dx(
    x: Tensor,
    dys: dict[int, Tensor],
    projections: Sequence[Projection],
    dhs: dict[int, Tensor],
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Σ dy weight + mask ∘ (dh lora_a), [M, K]."""
    dx, precision = torch.empty_like(x, memory_format=torch.contiguous_format), _precision(x)
    based = [i for i in dhs if projections[i].weight is not None]
    p, q = [dys[i] for i in based], [projections[i].weight for i in based]
    u, v = list(dhs.values()), [projections[i].lora_a for i in dhs]
    seeds = _seeds_of(list(dhs), seed)
    depth = sum(map(len, q))
    ranks = [dh.shape[1] for dh in u]
    plan = kernels.plan_for(x, x.shape[1], depth, ranks, precision, masked=seed is not None)
    if not plan.fused:
        for i, (dy, weight) in enumerate(zip(p, q, strict=True)):
            torch.addmm(dx, dy, weight, beta=float(i > 0), out=dx)
        p, q = [], []
    kernels.gemm_lowrank(
        dx, p, q, u, v, precision=precision, dropout=dropout, seeds=seeds, add=not plan.fused,
        preferred=plan.gemm,
    )  # fmt: skip
    return dx


def _layers(projections: Sequence[Projection]) -> list[list[Projection]]:
    """The projections of each output: the layer itself, and further adapters of it."""
    layers: list[list[Projection]] = [[] for _ in range(outputs_of(projections)[-1] + 1)]
    for projection, i in zip(projections, outputs_of(projections), strict=True):
        layers[i].append(projection)
    return layers


def _factor(projection: Projection, dropout: float) -> float:
    return float(projection.scale) / (1.0 - dropout)


def _seeds_of(used: list[int], seed: Tensor | None) -> Tensor | None:
    """The seeds of these projections; no index is sent to the device for it."""
    if seed is None or len(used) == len(seed):
        return seed
    return torch.cat([seed[i : i + 1] for i in used])


def _precision(x: Tensor) -> str:
    """How tensor cores may read float32; for the 16-bit dtypes it means nothing."""
    if x.dtype != torch.float32 or not kernels.target_of(x.device).tf32:
        return "ieee"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        # Since torch 2.9: it follows the older switches, whose getters raise if this one was used.
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
