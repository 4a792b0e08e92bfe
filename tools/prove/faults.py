"""Faults that the proof must find: planted ones, and each mask of each kernel dropped.

A fault must be found with numbers for which it shows.
"""

import ast
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .contracts import LEMMAS
from .modes import MODES, jitted, options, proof_of
from .source import KNOWN, Source, text_of


@dataclass
class Fault:
    """A kernel in some of its modes, or a lemma, with a changed function."""

    subject: str
    modes: list[dict[str, Any]]
    name: str
    edits: dict[str, str]  # by name of the function, its text
    is_planted: bool


# A lemma, or a kernel and its mode; a text in one of its functions; the text in its place.
PLANTED = [
    # Masks that are off by one, or a row without a segment.
    ("project", "        inside = (o_row < rows)[:, None] & (o_column < columns)",
     "        inside = (o_row < rows)[:, None] & (o_column <= columns)"),
    ("lowrank", "shape[1])\n    inside = (o_row <", "shape[1])\n    inside = (o_row <="),
    ("lowrank bias", "o_n < N", "o_n <= N"),
    ("quantize_rows", "mask=o_m < M", "mask=o_m <= M"),
    ("gated", "o_column < N", "o_column <= N"),
    ("gemm_int8_lowrank", "o_m < M", "o_m < M + 1"),
    ("dequant packing=nested", "o_group < groups", "o_group <= groups"),
    ("project segments=sorted own", "min(i_segment, segments - 1))", "i_segment)"),
    # Strides and operands.
    ("project", "o_row[:, None] * row_stride", "o_row[:, None] * column_stride"),
    ("weight_grad", "stride_n, stride_r = strides", "stride_r, stride_n = strides"),
    ("project segments=sorted", "i_segment.to(tl.int64) * v_", "(i_segment + 1).to(tl.int64) * v_"),
    ("gemm_lowrank packing=float8 segments=sorted transposed", "i_segment + 1", "i_segment + 2"),
    ("row_loss", "losses + i_row", "losses + i_row + 1"),
    ("dequant packing=int8", "// column_tiles * BLOCK_ROWS", "// column_tiles * BLOCK_COLUMNS"),
    # Planes, splits, segments.
    ("project split", "i_split.to(tl.int64) * M * R[i]", "i_split.to(tl.int64) * R[i]"),
    ("weight_grad xv", "i_tile.to(tl.int64) * M * R[0]", "i_tile.to(tl.int64) * R[0]"),
    ("weight_grad low_rank split", "first = i_split * steps", "first = i_split"),
    ("project segments=sorted", "u[i], b_u, i_m, i_r, end,", "u[i], b_u, i_m, i_r, M,"),
    ("weight_grad xv segments=sorted", "factor, i_m, 0, end,", "factor, i_m, 0, M,"),
    ("sum_planes", "pointers += size", "pointers += size + 1"),
    ("sum_planes count=2", "i_block -= blocks", "i_block -= blocks - 1"),
    # The tiles of programs.
    ("project", "tl.program_id(0) % R_TILES * BLOCK_R", "tl.program_id(0) % R_TILES"),
    ("gemm_lowrank", "n_tiles = tl.cdiv(N, BLOCK_N)", "n_tiles = N // BLOCK_N"),
    ("gemm_lowrank descriptors", "tl.num_programs(0) if PERSISTENT else 1", "1"),
    ("gemm_lowrank descriptors", "i * (BLOCK_N // 2)", "i * (BLOCK_N // 4)"),
    ("gemm_lowrank_few_rows", "if i_n == 0:", "if i_n >= 0:"),
    ("gated", "tl.program_id(0) // blocks", "tl.program_id(0) // (blocks + 1)"),
    ("quantize_rows", "b_code, i_m, i_k, M,", "b_code, i_m, i_k + 1, M,"),
    # 32 bits that wrap.
    ("row_loss", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    ("project split", "i_split.to(tl.int64) * M", "i_split * M"),
    ("lowrank bias", "o_n.to(tl.int64) * strides[1]", "o_n * strides[1]"),
    ("dequant packing=float8", "o_block.to(tl.int64)[:, None]", "o_block[:, None]"),
    ("sum_planes count=2 long", "i_block.to(tl.int64) * BLOCK", "i_block * BLOCK"),
    # The functions that are used as contracts.
    ("tile_of", "min(m_tiles - i_first, GROUP)", "GROUP"),
    ("tile_of", "% group_size // height", "% group_size // GROUP"),
    ("segment_of_tile of a row", "<= i_tile) &", "< i_tile) &"),
    ("segment_of_tile of a row", "start // BLOCK_M - i_segment", "start // BLOCK_M"),
    ("segment_of_tile of two tiles", "- i_segment, 0)", "- i_segment - 1, 0)"),
    ("any segment_of_tile", "min(max(start, 0), M)", "max(start, 0)"),
]  # fmt: skip


def planted(words: str, old: str, new: str) -> Fault:
    subject, _, mode = (words, "", "") if words in LEMMAS else words.partition(" ")
    ((name, text),) = [each for each in functions_of(subject).items() if old in each[1]]
    assert text.count(old) == 1, f"{name} has {text.count(old)} {old!r}"
    shown = f"{words}: {old!r} as {new!r}"
    return Fault(subject, [options(mode)], shown, {name: text.replace(old, new)}, True)


def functions_of(subject: str) -> dict[str, str]:
    """The texts of the functions that a kernel or a lemma calls."""
    texts, todo = {}, [jitted(subject).fn]
    while todo:
        plain = todo.pop()
        texts[plain.__name__] = text_of(plain)
        used = {n.id for n in ast.walk(ast.parse(text_of(plain))) if isinstance(n, ast.Name)}
        called = [plain.__globals__.get(name) for name in used - texts.keys() - KNOWN.keys()]
        todo += [each.fn for each in called if hasattr(each, "fn")]
    return texts


def masks_of(kernel: str) -> list[Fault]:
    """Each condition of each mask in the functions that a kernel calls."""
    faults = []
    for name, text in functions_of(kernel).items():
        starts = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
        for part in _mask_parts(ast.parse(text)):
            first = starts[part.lineno - 1] + part.col_offset
            end = starts[(part.end_lineno or 0) - 1] + (part.end_col_offset or 0)
            shown = f"{kernel}, {name}:{part.lineno}: mask {text[first:end]} dropped"
            edits = {name: text[:first] + "always" + text[end:]}
            faults.append(Fault(kernel, MODES[kernel], shown, edits, False))
    return faults


def _mask_parts(tree: ast.AST) -> list[ast.expr]:
    """The conditions of all masks, each with others in a conjunction or by itself."""
    nodes = [*ast.walk(tree)]
    masks = [n.value for n in nodes if isinstance(n, ast.keyword) and n.arg == "mask"]
    names = {mask.id for mask in masks if isinstance(mask, ast.Name)}
    assigned = [n for n in nodes if isinstance(n, ast.Assign)]
    masks += [n.value for n in assigned if ast.unparse(n.targets[0]) in names]
    parts = [[m.left, m.right] if isinstance(m, ast.BinOp) else [m] for m in masks]
    return [part for each in parts for part in each if not isinstance(part, ast.Name)]


def all_of(kernels: list[str]) -> list[Fault]:
    faults = [planted(*row) for row in PLANTED]
    faults = [fault for fault in faults if fault.subject in [*kernels, *LEMMAS]]
    return faults + [fault for kernel in kernels for fault in masks_of(kernel)]


def failure_of(fault: Fault) -> str:
    """What isn't proved, with the numbers for which the fault shows."""
    called = False
    for mode in fault.modes:
        source = Source(fault.edits)
        failure = proof_of(fault.subject, mode, source, fault.is_planted).failure
        if failure:
            return failure
        called |= not fault.edits.keys().isdisjoint(plain.__name__ for plain in source.made)
    return "" if called else "no mode calls it: modes = 0"


def lines_of(fault: Fault) -> tuple[bool, str]:
    failure = failure_of(fault)
    is_missed = " = " not in failure
    return is_missed, f"{'NOT FOUND' if is_missed else 'found'}: {fault.name}\n    {failure}"
