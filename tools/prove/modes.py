"""The modes of each kernel that are proved, and the proof of one."""

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from fastlora.kernels import launchers

from . import contracts, facts, once
from .engine import FailedError, Proof
from .source import Source, run

# The modes of each kernel that together have every line of it.
_ALL_WAYS = [
    {"segments": "sorted"}, {"segments": "any"},
    {"segments": "sorted", "order": True, "own": True, "masked": True},
]  # fmt: skip
_FORMATS = [
    {"kind": "four-bit", "in_blocks": False}, {"kind": "four-bit", "outer": True},
    {"kind": "int8", "whole_rows": True}, {"kind": "float8"}, {"kind": "float8 by bits"},
    {"kind": "float8", "whole_rows": True, "in_blocks": False},
]  # fmt: skip
MODES: dict[str, tuple[Callable[..., facts.Facts], list[dict[str, Any]]]] = {
    "project": (facts.project, [
        {}, {"count": 4, "masked": True}, {"count": 2, "split": True}, *_ALL_WAYS,
        {"segments": "sorted", "split": True},
    ]),
    "quantize_rows": (facts.quantize_rows, [{}, {"scaled": True}]),
    "lowrank": (facts.lowrank, [
        {"count": 0, "bias": True}, {"count": 4, "masked": True, "add": True},
        {"count": 2, "at_once": True, "bias": True}, *_ALL_WAYS,
        {"segments": "sorted", "order": True, "add": True, "bias": True},
    ]),
    "gemm_lowrank": (facts.gemm_lowrank, [
        {"count": 0}, {"count": 2, "bias": True, "transposed": True},
        {"count": 4, "depths": 4, "masked": True, "add": True},
        {"at_once": True, "transposed": True},
        {"descriptors": True, "transposed": True, "bias": True},
        {"count": 2, "depths": 2, "descriptors": True, "masked": True},
        {"segments": "sorted", "bias": True}, {"segments": "any", "transposed": True},
        {"segments": "sorted", "descriptors": True}, {"segments": "any", "descriptors": True},
        *[{"packing": each, "transposed": i % 2 == 0} for i, each in enumerate(_FORMATS)],
        {"packing": _FORMATS[1], "depths": 2},
        {"packing": _FORMATS[1], "segments": "sorted", "transposed": True},
        {"packing": _FORMATS[3], "segments": "any"},
    ]),
    "gemm_lowrank_few_rows": (facts.gemm_lowrank_few_rows, [
        {"bias": True}, {"transposed": True}, {"descriptors": True, "transposed": True},
        {"packing": _FORMATS[1], "transposed": True}, {"packing": _FORMATS[2]},
    ]),
    "gemm_int8_lowrank": (facts.gemm_int8_lowrank, [
        {"bias": True, "transposed": True}, {"count": 2, "depths": 2, "rotated": True, "add": True},
        {"count": 2, "masked": True, "rotated": True, "depths": 2},
        {"descriptors": True, "transposed": True},
    ]),
    "weight_grad": (facts.weight_grad, [
        {}, {"count": 4, "masked": True}, {"count": 2, "split": True, "transposed": True},
        {"xv": True}, {"xv": True, "split": True, "transposed": True},
        {"low_rank": True, "count": 2, "masked": True, "add": True},
        {"low_rank": True, "split": True}, *_ALL_WAYS,
        *[{**each, "xv": True} for each in _ALL_WAYS],
    ]),
    "sum_planes": (facts.sum_planes, [
        {"count": 1}, {"count": 2}, {"count": 4}, {"count": 2, "long": True},
    ]),
    "gated": (facts.elementwise(launchers.gated, "gate up", "out"), [{}]),
    "gated_backward": (
        facts.elementwise(launchers.gated_backward, "dy gate up", "d_gate d_up"), [{}],
    ),
    "row_loss": (facts.row_loss, [{}, {"gradient": True}, {"gradient": True, "upstream": True}]),
    "dequant": (facts.dequant, [{"packing": each} for each in _FORMATS]),
}  # fmt: skip

CONTRACT_PROOFS: dict[str, Callable[..., Proof]] = {
    "tile_of": contracts.prove_tile_of,
    "segment_of_tile, sorted ends": partial(contracts.prove_segment_of_tile, True),
    "segment_of_tile, any ends": partial(contracts.prove_segment_of_tile, False),
}
_reached: dict[str, set[str]] = {}  # by kernel, the sites whose access happens in a mode


def jitted(kernel: str) -> Any:
    file = "gated" if kernel == "gated_backward" else kernel
    return getattr(importlib.import_module(f"fastlora.kernels.{file}"), f"{kernel}_kernel")


def parameters(kernel: str) -> tuple[str, ...]:
    code = jitted(kernel).fn.__code__
    return code.co_varnames[: code.co_argcount]


def proof_of(
    kernel: str, mode: dict[str, Any], source: Source | None = None, is_whole: bool = True,
    **options: Any,
) -> Proof:  # fmt: skip
    """The proof of a kernel in a mode; unless ``is_whole``, without "stored once"."""
    proof = Proof(reached=_reached.setdefault(kernel, set()), **options)

    def setup(proof: Proof) -> facts.Facts:
        return MODES[kernel][0](proof, **mode)

    run(proof, source or Source(contracts.CONTRACTS), jitted(kernel), setup)
    if is_whole and mode.get("segments") != "any" and not proof.failures:
        with suppress(FailedError):
            once.check(proof)
    return proof


def lines_of(kernel: str, mode: dict[str, Any]) -> tuple[bool, str]:
    words = [f"{name}={value}" for name, value in mode.items()]
    return _said(" ".join([kernel, *words]), proof_of(kernel, mode))


def lines_of_contract(name: str) -> tuple[bool, str]:
    return _said(name, CONTRACT_PROOFS[name]())


def _said(name: str, proof: Proof) -> tuple[bool, str]:
    failures = [f"    not proved: {what}: {why}" for what, why in proof.failures.items()]
    return bool(failures), "\n".join([f"{name}: {proof.proved} claims proved", *failures])
