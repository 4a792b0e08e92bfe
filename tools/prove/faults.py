"""Faults that the proof must find: planted ones, and each mask of each kernel dropped.

A planted fault must be found with numbers for which it shows.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from . import contracts
from .modes import CONTRACT_PROOFS, MODES, jitted, proof_of
from .source import OPAQUE, Edit, Source, mask_parts


@dataclass
class Fault:
    """``subject``: a kernel, in some of its modes, or a contract."""

    subject: str
    modes: list[dict[str, Any]]
    edit: Edit

    @property
    def name(self) -> str:
        if self.edit.old:
            return f"{self.subject}, {self.edit.function}: {self.edit.old!r} as {self.edit.new!r}"
        return f"{self.subject}, {self.edit.function}: mask {self.edit.mask} dropped"


def _planted(subject: str, function: str, old: str, new: str, **mode: Any) -> Fault:
    return Fault(subject, [mode], Edit(function, old, new))


_SORTED = {"segments": "sorted"}
PLANTED = [
    # Masks that are dropped, or off by one.
    _planted("project", "load_tile", "(o_row < rows)[:, None] & ", ""),
    _planted("project", "load_tile", "o_column < columns", "o_column <= columns"),
    _planted("lowrank", "store_tile", "o_row < rows", "o_row <= rows"),
    _planted("lowrank", "load_bias_row", "o_n < N", "o_n <= N", bias=True),
    _planted("quantize_rows", "quantize_rows_kernel", "mask=o_m < M", "mask=o_m <= M"),
    _planted("gated", "gated_kernel", "o_column < N", "o_column <= N"),
    _planted("row_loss", "row_loss_kernel", "(i_target >= 0) & ", ""),
    _planted("gemm_int8_lowrank", "scaled_sum", "o_m < M", "o_m < M + 1"),
    _planted("dequant", "scale_tile", "o_group < groups", "o_group <= groups",
             packing={"kind": "four-bit", "outer": True}),
    _planted("project", "own_number", "min(i_segment, segments - 1)", "i_segment",
             own=True, **_SORTED),
    # Strides and operands.
    _planted("project", "tile_pointers", "o_row[:, None] * row_stride",
             "o_row[:, None] * column_stride"),
    _planted("weight_grad", "store_sum", "stride_e, stride_n, stride_r = strides",
             "stride_e, stride_r, stride_n = strides"),
    _planted("project", "project_kernel", "i_segment.to(tl.int64) * v_strides[i][0]",
             "(i_segment + 1).to(tl.int64) * v_strides[i][0]", **_SORTED),
    _planted("gemm_lowrank", "load_q_tile", "rows *= i_segment + 1", "rows *= i_segment + 2",
             packing={"kind": "float8"}, segments="sorted", transposed=True),
    _planted("row_loss", "row_loss_kernel", "losses + i_row", "losses + i_row + 1"),
    _planted("dequant", "dequant_kernel", "// column_tiles * BLOCK_ROWS",
             "// column_tiles * BLOCK_COLUMNS", packing={"kind": "int8", "whole_rows": True}),
    # Planes, splits, segments.
    _planted("project", "project_kernel", "i_split.to(tl.int64) * M * R[i]",
             "i_split.to(tl.int64) * R[i]", split=True),
    _planted("weight_grad", "weight_grad_kernel", "i_tile.to(tl.int64) * M * R[0]",
             "i_tile.to(tl.int64) * R[0]", xv=True),
    _planted("weight_grad", "rows_of_program", "first = i_split * steps * BLOCK_M",
             "first = i_split * BLOCK_M", low_rank=True, split=True),
    _planted("project", "project_kernel", "store_tile(u[i], b_u, i_m, i_r, end,",
             "store_tile(u[i], b_u, i_m, i_r, M,", **_SORTED),
    _planted("weight_grad", "weight_grad_kernel", "b_xv * factor, i_m, 0, end,",
             "b_xv * factor, i_m, 0, M,", xv=True, **_SORTED),
    _planted("sum_planes", "sum_planes_kernel", "pointers += size", "pointers += size + 1"),
    _planted("sum_planes", "sum_planes_kernel", "i_block -= blocks", "i_block -= blocks - 1",
             count=2),
    # The tiles of programs.
    _planted("project", "project_kernel", "tl.program_id(0) % R_TILES * BLOCK_R",
             "tl.program_id(0) % R_TILES"),
    _planted("gemm_lowrank", "gemm_lowrank_kernel", "n_tiles = tl.cdiv(N, BLOCK_N)",
             "n_tiles = N // BLOCK_N"),
    _planted("gemm_lowrank", "gemm_lowrank_kernel", "tl.num_programs(0) if PERSISTENT else 1",
             "1", descriptors=True),
    _planted("gemm_lowrank", "finish_tile", "i * (BLOCK_N // 2)", "i * (BLOCK_N // 4)",
             descriptors=True),
    _planted("gemm_lowrank_few_rows", "gemm_lowrank_few_rows_kernel", "if i_n == 0:",
             "if i_n >= 0:"),
    _planted("gated", "row_and_columns", "tl.program_id(0) // blocks",
             "tl.program_id(0) // (blocks + 1)"),
    _planted("quantize_rows", "quantize_rows_kernel", "store_tile(codes, b_code, i_m, i_k, M,",
             "store_tile(codes, b_code, i_m, i_k + 1, M,"),
    # 32 bits that wrap.
    _planted("row_loss", "row_loss_kernel", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    _planted("project", "project_kernel", "i_split.to(tl.int64) * M", "i_split * M", split=True),
    _planted("lowrank", "load_bias_row", "o_n.to(tl.int64) * strides[1]", "o_n * strides[1]",
             bias=True),
    _planted("dequant", "scale_tile", "o_block.to(tl.int64)[:, None]", "o_block[:, None]",
             packing={"kind": "float8"}),
    _planted("sum_planes", "sum_planes_kernel", "i_block.to(tl.int64) * BLOCK",
             "i_block * BLOCK", count=2, long=True),
    # The functions that are used as contracts.
    _planted("tile_of", "tile_of", "min(m_tiles - i_first, GROUP)", "GROUP"),
    _planted("tile_of", "tile_of", "% group_size // height", "% group_size // GROUP"),
    _planted("segment_of_tile, sorted ends", "segment_of_tile", "<= i_tile) &", "< i_tile) &"),
    _planted("segment_of_tile, sorted ends", "segment_of_tile",
             "i_tile - start // BLOCK_M - i_segment", "i_tile - start // BLOCK_M"),
    _planted("segment_of_tile, any ends", "segment_rows", "min(max(start, 0), M)",
             "max(start, 0)"),
]  # fmt: skip


def _masks_of(kernel: str) -> list[Fault]:
    """Each condition of each mask in the functions that a kernel calls."""
    faults, todo, seen = [], [jitted(kernel).fn], set()
    while todo:
        plain = todo.pop()
        if plain in seen or plain.__name__ in OPAQUE | contracts.CONTRACTS:
            continue
        seen.add(plain)
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        called = [plain.__globals__.get(name) for name in used]
        todo += [each.fn for each in called if hasattr(each, "fn")]
        faults += [
            Fault(kernel, MODES[kernel], Edit(plain.__name__, mask=i))
            for i in range(len(mask_parts(tree)))
        ]
    return faults


def all_of(kernels: list[str]) -> list[Fault]:
    masks = [fault for kernel in kernels for fault in _masks_of(kernel)]
    return [fault for fault in PLANTED if fault.subject in [*kernels, *CONTRACT_PROOFS]] + masks


def failures_of(fault: Fault) -> dict[str, str]:
    """By site, the numbers for which the fault shows."""
    if fault.subject in CONTRACT_PROOFS:
        return CONTRACT_PROOFS[fault.subject](fault.edit).failures
    called = False
    for mode in fault.modes:
        source = Source(contracts.CONTRACTS, fault.edit)
        proof = proof_of(fault.subject, mode, source, bool(fault.edit.old), stops=True)
        if proof.failures:
            return proof.failures
        called |= fault.edit.function in {plain.__name__ for plain in source.made}
    return {} if called else {"no mode calls it": "modes = 0"}


def lines_of(fault: Fault) -> tuple[bool, str]:
    found = failures_of(fault)
    shown = [f"    {site}: {numbers}" for site, numbers in found.items()]
    is_missed = not any(" = " in numbers for numbers in found.values())
    return is_missed, "\n".join([f"{'NOT FOUND' if is_missed else 'found'}: {fault.name}", *shown])
