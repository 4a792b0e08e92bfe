"""h and dh: the thin products of a group, with one pass over x."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot, dropout_threshold, keep_tile, known_multiple, load_tile, store_tile
from .config import MAX_PROJECTIONS, Call, ProjectConfig, block_r, cdiv, chunks, splits
from .defaults import chosen_config
from .launch import Launch, Work, launch, size_of
from .sum_planes import sum_planes
from .target import target_of


@triton.jit(do_not_specialize=["M"])  # batches and sequences come in all lengths
def project_kernel(
    x, a, out, seeds,
    M, K, R, factors, threshold, k_per_split,
    x_rows, x_columns, a_rows, a_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_TILES: tl.constexpr,
    RANKS_OF_8: tl.constexpr,
    A_ROWS_OF_8: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT_i = factor_i · (keep_i ∘ X) A_i, or the planes whose sum that is.

    X [M, K], A_i [K, R_i], OUT_i [splits, M, R_i]: plane s is of the k_per_split columns from
    s · k_per_split on.
    """
    i_r, i_m = tl.program_id(0) % R_TILES * BLOCK_R, tl.program_id(0) // R_TILES * BLOCK_M
    i_split = tl.program_id(1)
    sums, keys = (), ()
    for i in tl.static_range(len(a)):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
        if seeds is not None:
            keys = keys + (tl.load(seeds + i),)
    first = i_split * k_per_split
    for i_k in range(first, min(first + k_per_split, K), BLOCK_K):
        b_x = load_tile(x, i_m, i_k, M, K, x_rows, x_columns, BLOCK_M, BLOCK_K)
        new = ()
        for i in tl.static_range(len(a)):
            r = known_multiple(R[i], RANKS_OF_8)
            a_row = known_multiple(a_rows[i], A_ROWS_OF_8)
            b_a = load_tile(a[i], i_k, i_r, K, r, a_row, a_columns[i], BLOCK_K, BLOCK_R)
            b_kept = b_x
            if seeds is not None:
                keep = keep_tile(keys[i], i_m, i_k, threshold, BLOCK_M, BLOCK_K)
                b_kept = tl.where(keep, b_x, 0.0)
            new = new + (dot(b_kept, cast(b_a, b_x.dtype), sums[i], PRECISION),)
        sums = new
    for i in tl.static_range(len(a)):
        r = known_multiple(R[i], RANKS_OF_8)
        plane = out[i] + i_split.to(tl.int64) * M * r
        store_tile(plane, sums[i] * factors[i], i_m, i_r, M, r, r, 1)


def project(
    x: Tensor,
    adapters: Sequence[Tensor],
    factors: Sequence[float],
    *,
    precision: str,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    config: ProjectConfig | None = None,
) -> list[Tensor]:
    """factor_i · (keep_i ∘ x) a_i for every a_i of ``adapters``: [M, R_i], in x's dtype.

    x [M, K] and a_i [K, R_i] have any strides; a_i any floating dtype of at most 32 bits, cast as
    it is read.  ``seeds``: int64, one for each a_i, with ``dropout``.
    """
    if len(adapters) > MAX_PROJECTIONS:
        return [
            product
            for part in chunks(len(adapters))
            for product in project(
                x, adapters[part], factors[part],
                precision=precision, dropout=dropout,
                seeds=None if seeds is None else seeds[part], config=config,
            )
        ]  # fmt: skip
    (M, K), ranks = x.shape, [a.shape[1] for a in adapters]
    target = target_of(x.device)
    call = Call(M, K, max(ranks), x.element_size(), precision, len(adapters), seeds is not None)
    config = chosen_config("project", target, call, config)
    count, k_per_split = splits(config, target, call, K, config.block_k)
    out = [x.new_empty(M, r) for r in ranks]
    parts = out
    if count > 1:
        parts = [x.new_empty(count, M, r, dtype=torch.float32) for r in ranks]
    r_block = block_r(config, call)
    m_tiles, r_tiles = cdiv(M, config.block_m), cdiv(max(ranks), r_block)

    def work() -> Work:
        stored = size_of(*parts)
        return Work(
            flops=2 * M * K * sum(ranks),
            loaded=size_of(x, seeds, *adapters),
            stored=stored,
            loaded_by_tiles=size_of(x) * r_tiles
            + size_of(*adapters) * m_tiles
            + size_of(seeds) * m_tiles * r_tiles * count,
            partial=stored if count > 1 else 0,
        )

    arguments = {
        "x": x, "a": tuple(adapters), "out": tuple(parts), "seeds": seeds,
        "M": M, "K": K, "R": tuple(ranks), "factors": tuple(factors),
        "threshold": dropout_threshold(dropout), "k_per_split": k_per_split,
        "x_rows": x.stride(0), "x_columns": x.stride(1),
        "a_rows": tuple(a.stride(0) for a in adapters),
        "a_columns": tuple(a.stride(1) for a in adapters),
        "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_R": r_block,
        "R_TILES": r_tiles, "PRECISION": precision,
        "RANKS_OF_8": all(r % 8 == 0 for r in ranks),
        "A_ROWS_OF_8": all(a.stride(0) % 8 == 0 for a in adapters),
    }  # fmt: skip
    grid = (m_tiles * r_tiles, count)
    launch(Launch(project_kernel, grid, arguments, config.warps, config.stages, work))
    if count > 1:
        sum_planes(parts, out)
    return out
