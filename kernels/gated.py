"""The elementwise part of a gated MLP, OUT = act(GATE) ∘ UP, and its gradients."""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import cast
from .config import LONGEST, cdiv
from .launch import Launch, Work, launch, size_of, stated

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

_BLOCK, _WARPS = 1024, 4  # 128 threads with 8 elements of 16 bits: one load of 16 bytes each


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch."""
    loaded = size_of(*(arguments.get(name) for name in ("dy", "gate", "up")))
    stored = size_of(*(arguments.get(name) for name in ("out", "d_gate", "d_up")))
    flops = 10 * arguments["gate"].numel() * (2 if "dy" in arguments else 1)  # an estimate
    return Work(flops, loaded, stored, loaded_by_tiles=loaded)


@triton.jit
def activated(b_gate, ACTIVATION: tl.constexpr):
    """act(gate) and act'(gate), in float32.  The compiler removes a result that isn't used.

    ``b_share`` is act(gate) / gate, which the derivative also contains.
    """
    if ACTIVATION == "silu":  # gate · sigmoid(gate)
        b_share = tl.sigmoid(b_gate)
        return b_gate * b_share, b_share * (1.0 + b_gate * (1.0 - b_share))
    elif ACTIVATION == "gelu":  # gate · Φ(gate): b_share is the normal CDF, b_density its slope
        b_share = 0.5 * (1.0 + tl.math.erf(b_gate * 0.7071067811865476))
        b_density = 0.3989422804014327 * tl.exp(-0.5 * b_gate * b_gate)
        return b_gate * b_share, b_share + b_gate * b_density
    elif ACTIVATION == "gelu_tanh":  # gate · (1 + tanh z) / 2, and (1 + tanh z) / 2 = sigmoid(2 z)
        b_square = b_gate * b_gate
        b_share = tl.sigmoid(1.5957691216057308 * b_gate * (1.0 + 0.044715 * b_square))
        b_slope = 1.5957691216057308 * (1.0 + 0.134145 * b_square)
        return b_gate * b_share, b_share * (1.0 + b_gate * (1.0 - b_share) * b_slope)
    else:
        b_is_above = tl.where(b_gate > 0.0, 1.0, 0.0)  # the slope of relu
        b_positive = tl.where(b_gate < 0.0, 0.0, b_gate)  # NaN stays NaN
        if ACTIVATION == "relu2":
            return b_positive * b_positive, 2.0 * b_positive
        else:
            return b_positive, b_is_above


@triton.jit
def row_and_columns(N, BLOCK: tl.constexpr):
    """A program's row, and its columns [BLOCK].  A row takes ⌈N / BLOCK⌉ programs."""
    blocks = tl.cdiv(N, BLOCK)
    i_row = tl.program_id(0) // blocks
    return i_row.to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit(launch_metadata=stated(_work_of))
def gated_kernel(
    gate, up, out,
    N,
    gate_row_stride, up_row_stride, out_row_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT = act(GATE) ∘ UP.  GATE, UP and OUT are [M, N] with contiguous columns."""
    i_row, o_column = row_and_columns(N, BLOCK)
    inside = o_column < N
    b_gate = tl.load(gate + i_row * gate_row_stride + o_column, mask=inside, other=0.0)  # [BLOCK]
    b_up = tl.load(up + i_row * up_row_stride + o_column, mask=inside, other=0.0)  # [BLOCK]
    b_act, _ = activated(b_gate.to(tl.float32), ACTIVATION)  # [BLOCK], float32
    b_out = cast(b_act * b_up.to(tl.float32), out.dtype.element_ty)
    tl.store(out + i_row * out_row_stride + o_column, b_out, mask=inside)


@triton.jit(launch_metadata=stated(_work_of))
def gated_backward_kernel(
    dy, gate, up, d_gate, d_up,
    N,
    dy_row_stride, gate_row_stride, up_row_stride, d_gate_row_stride, d_up_row_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D_GATE = act'(GATE) ∘ DY ∘ UP and D_UP = DY ∘ act(GATE).

    All are [M, N] with contiguous columns.  A program reads its elements of all operands before it
    writes, so D_GATE or D_UP may share DY's memory.
    """
    i_row, o_column = row_and_columns(N, BLOCK)
    inside = o_column < N
    b_dy = tl.load(dy + i_row * dy_row_stride + o_column, mask=inside, other=0.0)  # [BLOCK]
    b_gate = tl.load(gate + i_row * gate_row_stride + o_column, mask=inside, other=0.0)  # [BLOCK]
    b_up = tl.load(up + i_row * up_row_stride + o_column, mask=inside, other=0.0)  # [BLOCK]
    b_act, b_slope = activated(b_gate.to(tl.float32), ACTIVATION)  # [BLOCK] each, float32
    b_dy = b_dy.to(tl.float32)
    b_d_gate = cast(b_dy * b_up.to(tl.float32) * b_slope, d_gate.dtype.element_ty)
    b_d_up = cast(b_dy * b_act, d_up.dtype.element_ty)
    tl.store(d_gate + i_row * d_gate_row_stride + o_column, b_d_gate, mask=inside)
    tl.store(d_up + i_row * d_up_row_stride + o_column, b_d_up, mask=inside)


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> Tensor:
    """Fill ``out`` with act(gate) ∘ up, computed in float32 and rounded once; returns ``out``.

    All are [M, N] with 16 or 32 bits.  Columns have stride 1, rows any stride: the two halves of
    one matrix fit.  ``activation`` is one of ``ACTIVATIONS``.
    """
    _launch(gated_kernel, activation, gate=gate, up=up, out=out)
    return out


def gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor
) -> None:
    """Fill d_gate = act'(gate) ∘ dy ∘ up and d_up = dy ∘ act(gate); operands as in :func:`gated`.

    One of the two may be dy itself.
    """
    _launch(gated_backward_kernel, activation, dy=dy, gate=gate, up=up, d_gate=d_gate, d_up=d_up)


def _launch(kernel: Any, activation: str, **matrices: Tensor) -> None:
    assert activation in ACTIVATIONS
    M, N = matrices["gate"].shape
    assert N <= LONGEST
    arguments: dict[str, Any] = {
        **matrices,
        "N": N,
        **{f"{name}_row_stride": matrix.stride(0) for name, matrix in matrices.items()},
        "ACTIVATION": activation,
        "BLOCK": _BLOCK,
    }
    grid = (M * cdiv(N, _BLOCK),)
    launch(Launch(kernel, grid, arguments, warps=_WARPS, stages=1, work_of=_work_of))


def why_not_gated(matrix: Tensor) -> str:
    """Why these kernels can't take a matrix of a supported dtype; "" if they can."""
    M, N = matrix.shape
    if matrix.stride(1) != 1 and N > 1:
        return "its columns aren't contiguous"
    if matrix.is_neg():
        return "it is a negated view"
    programs = M * cdiv(N, _BLOCK)
    return "" if 0 < programs < 2**31 else f"it needs {programs} programs, not 1 to 2³¹ - 1"
