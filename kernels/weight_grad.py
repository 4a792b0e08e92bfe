"""d lora_a and d lora_b: products over rows; and dh in the same pass over dy."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot, dropout_threshold, keep_tile, known_multiple, load_tile, store_tile
from .config import (
    MAX_PROJECTIONS,
    Call,
    WeightGradConfig,
    block_r,
    cdiv,
    chunks,
    partial_sums,
    splits,
    tiles,
)
from .defaults import chosen_config, default_config
from .launch import Launch, Work, launch, size_of
from .sum_planes import sum_planes
from .target import target_of


@triton.jit(do_not_specialize=["M"])  # batches and sequences come in all lengths
def weight_grad_kernel(
    v, u, out, b, projected, seeds,
    M, N, R, factor, threshold, m_per_split,
    v_rows, v_columns, out_rows, out_columns, b_rows, b_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_TILES: tl.constexpr,
    RANKS_OF_8: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT_i = (keep_i ∘ V)ᵀ U_i, or the planes whose sum that is; and PROJECTED: factor · V B.

    V [M, N], U_i [M, R_i], OUT_i [splits, N, R_i]: plane s sums the rows from s · m_per_split on.
    B [N, R_0], if it is there, gives PROJECTED [N / BLOCK_N, M, R_0], a plane for every tile of
    columns.
    """
    i_r, i_tile = tl.program_id(0) % R_TILES * BLOCK_R, tl.program_id(0) // R_TILES
    i_n, i_split = i_tile * BLOCK_N, tl.program_id(1)
    if b is not None:
        b_b = load_tile(b, i_n, 0, N, R[0], b_rows, b_columns, BLOCK_N, BLOCK_R)
        plane_of_columns = projected + i_tile.to(tl.int64) * M * R[0]
    sums, keys = (), ()
    for i in tl.static_range(len(u)):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
        if seeds is not None:
            keys = keys + (tl.load(seeds + i),)
    first = i_split * m_per_split
    for i_m in range(first, min(first + m_per_split, M), BLOCK_M):
        b_v = load_tile(v, i_m, i_n, M, N, v_rows, v_columns, BLOCK_M, BLOCK_N)
        new = ()
        for i in tl.static_range(len(u)):
            r = known_multiple(R[i], RANKS_OF_8)
            b_u = load_tile(u[i], i_m, i_r, M, r, r, 1, BLOCK_M, BLOCK_R)
            b_kept = b_v
            if seeds is not None:
                keep = keep_tile(keys[i], i_m, i_n, threshold, BLOCK_M, BLOCK_N)
                b_kept = tl.where(keep, b_v, 0.0)
            new = new + (dot(b_kept.T, b_u, sums[i], PRECISION),)
        sums = new
        if b is not None:
            b_part = dot(
                b_v, cast(b_b, b_v.dtype), tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION
            )
            r = known_multiple(R[0], RANKS_OF_8)
            store_tile(plane_of_columns, b_part * factor, i_m, 0, M, r, r, 1)
    for i in tl.static_range(len(u)):
        plane = out[i] + i_split.to(tl.int64) * N * R[i]
        store_tile(plane, sums[i], i_n, i_r, N, R[i], out_rows[i], out_columns[i])


def weight_grad(
    v: Tensor,
    us: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    precision: str,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    b: Tensor | None = None,
    factor: float = 1.0,
    config: WeightGradConfig | None = None,
) -> Tensor | None:
    """out_i = (keep_i ∘ v)ᵀ u_i, into ``outs``; and, given ``b``, factor · v b in the same pass.

    v [M, N] has any strides, u_i [M, R_i] is contiguous and in v's dtype.  out_i [N, R_i] has any
    dtype, and is contiguous or the transpose of a contiguous tensor.  b [N, R_0] has any strides
    and dtype; the product [M, R_0] comes back in v's.  ``seeds`` as in :func:`project`.
    """
    if len(us) > MAX_PROJECTIONS:
        for part in chunks(len(us)):
            weight_grad(
                v, us[part], outs[part],
                precision=precision, dropout=dropout,
                seeds=None if seeds is None else seeds[part], config=config,
            )  # fmt: skip
        return None
    (M, N), ranks = v.shape, [u.shape[1] for u in us]
    target = target_of(v.device)
    call = Call(
        M, N, max(ranks), v.element_size(), precision, len(us), seeds is not None, b is not None
    )
    config = chosen_config("weight_grad", target, call, config)
    count, m_per_split = splits(config, target, call, M, config.block_m)
    n_tiles, r_block = tiles(config, call), block_r(config, call)
    r_tiles = cdiv(max(ranks), r_block)
    projected = product = None
    if b is not None:
        projected = product = v.new_empty(M, ranks[0])
        if n_tiles > 1:
            projected = v.new_empty(n_tiles, M, ranks[0], dtype=torch.float32)
    parts = outs
    if count > 1:
        # Strides as in outs, so that a sum over planes runs along both in memory.
        parts = [out.new_empty(count, *_dense(out).shape, dtype=torch.float32) for out in outs]
        parts = [
            part if out.is_contiguous() else part.mT for part, out in zip(parts, outs, strict=True)
        ]

    def work() -> Work:
        planes = size_of(*parts) * (count > 1) + size_of(projected) * (n_tiles > 1)
        return Work(
            flops=2 * M * N * (sum(ranks) + (0 if b is None else ranks[0])),
            loaded=size_of(v, b, seeds, *us),
            stored=size_of(projected, *parts),
            loaded_by_tiles=size_of(v) * r_tiles
            + size_of(*us) * n_tiles
            + size_of(b) * count
            + size_of(seeds) * n_tiles * r_tiles * count,
            partial=planes,
        )

    arguments = {
        "v": v, "u": tuple(us), "out": tuple(parts), "b": b, "projected": projected,
        "seeds": seeds,
        "M": M, "N": N, "R": tuple(ranks), "factor": factor,
        "threshold": dropout_threshold(dropout), "m_per_split": m_per_split,
        "v_rows": v.stride(0), "v_columns": v.stride(1),
        "out_rows": tuple(part.stride(-2) for part in parts),
        "out_columns": tuple(part.stride(-1) for part in parts),
        "b_rows": 0 if b is None else b.stride(0), "b_columns": 0 if b is None else b.stride(1),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_R": r_block,
        "R_TILES": r_tiles, "PRECISION": precision, "RANKS_OF_8": all(r % 8 == 0 for r in ranks),
    }  # fmt: skip
    grid = (n_tiles * r_tiles, count)
    launch(Launch(weight_grad_kernel, grid, arguments, config.warps, config.stages, work))
    sums = [] if count == 1 else list(zip(map(_dense, parts), map(_dense, outs), strict=True))
    if projected is not product:
        sums.append((projected, product))
    if sums:
        sum_planes(*zip(*sums, strict=True))
    return product


def one_pass_pays(v: Tensor, b: Tensor, precision: str) -> bool:
    """Whether the partial sums of one pass over v are fewer bytes than a second reading of it."""
    (M, N), r = v.shape, b.shape[1]
    target = target_of(v.device)
    call = Call(M, N, r, v.element_size(), precision, project=True)
    config = default_config("weight_grad", target, call)
    if config is None:
        return False
    return 2 * 4 * partial_sums(config, target, call) < M * N * v.element_size()


def _dense(tensor: Tensor) -> Tensor:
    """A contiguous tensor, or the one whose transpose this is."""
    return tensor if tensor.is_contiguous() else tensor.mT
