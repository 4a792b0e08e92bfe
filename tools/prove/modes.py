"""The modes of each kernel that are proved, and the proof of one."""

import importlib
from typing import Any

from . import facts, once
from .contracts import LEMMAS
from .engine import Proof
from .source import Source, run
from .values import FailedError

# Formats of packed weights, as the words of a mode name them.
_FORMATS = {
    "rows": {"kind": "four-bit", "in_blocks": False}, "nested": {"kind": "four-bit", "outer": True},
    "int8": {"kind": "int8", "whole_rows": True}, "float8": {"kind": "float8"},
    "float8-by-bits": {"kind": "float8 by bits"},
    "float8-tensor": {"kind": "float8", "whole_rows": True, "in_blocks": False},
}  # fmt: skip
_SEGMENTS = ["segments=sorted", "segments=any", "segments=sorted order own masked"]
# The modes of each kernel that together have every line of it: options of facts.Call.
_MODES = {
    "project": ["", "count=4 masked", "count=2 split", *_SEGMENTS, "segments=sorted split"],
    "quantize_rows": ["", "scaled"],
    "lowrank": [
        "count=0 bias", "count=4 masked add", "count=2 at_once bias", *_SEGMENTS,
        "segments=sorted order add bias",
    ],
    "gemm_lowrank": [
        "count=0", "count=2 bias transposed", "count=4 depths=4 masked add", "at_once transposed",
        "descriptors transposed bias", "count=2 depths=2 descriptors masked",
        "segments=sorted bias", "segments=any transposed", "segments=sorted descriptors",
        "segments=any descriptors", "packing=rows transposed", "packing=nested",
        "packing=int8 transposed", "packing=float8", "packing=float8-by-bits transposed",
        "packing=float8-tensor", "packing=nested depths=2",
        "packing=nested segments=sorted transposed", "packing=float8 segments=any",
    ],
    "gemm_lowrank_few_rows": [
        "bias", "transposed", "descriptors transposed", "packing=nested transposed", "packing=int8",
    ],
    "gemm_int8_lowrank": [
        "bias transposed", "count=2 depths=2 rotated add", "count=2 depths=2 rotated masked",
        "descriptors transposed",
    ],
    "weight_grad": [
        "", "count=4 masked", "count=2 split transposed", "xv", "xv split transposed",
        "count=2 low_rank masked add", "low_rank split", *_SEGMENTS,
        *[f"{words} xv" for words in _SEGMENTS],
    ],
    "sum_planes": ["", "count=2", "count=4", "count=2 long"],
    "gated": [""],
    "gated_backward": [""],
    "row_loss": ["", "gradient", "gradient upstream"],
    "dequant": [f"packing={name}" for name in _FORMATS],
}  # fmt: skip


def options(words: str) -> dict[str, Any]:
    pairs = [word.partition("=") for word in words.split()]
    values = {name: int(value) if value.isdigit() else value or True for name, _, value in pairs}
    return values | ({"packing": _FORMATS[values["packing"]]} if "packing" in values else {})


MODES = {kernel: [*map(options, modes)] for kernel, modes in _MODES.items()}
_reached: dict[str, set[str]] = {}  # by kernel, the sites whose access happens in a mode


def jitted(kernel: str) -> Any:
    """The function of a kernel or a lemma."""
    if kernel in LEMMAS:
        return LEMMAS[kernel][0]
    file = "gated" if kernel == "gated_backward" else kernel
    return getattr(importlib.import_module(f"fastlora.kernels.{file}"), f"{kernel}_kernel")


def facts_of(proof: Proof, kernel: str, mode: dict[str, Any]) -> facts.Facts:
    return getattr(facts.Call(proof, **mode), kernel)()


def proof_of(
    subject: str, mode: dict[str, Any], source: Source | None = None, is_whole: bool = True
) -> Proof:
    """The proof of a lemma, or of a kernel in a mode; unless ``is_whole``, without "stored once".

    It ends at the first failure.
    """
    proof, source = Proof(reached=_reached.setdefault(subject, set())), source or Source()
    function = source.function(jitted(subject))
    try:
        if subject in LEMMAS:
            for _ in proof.paths():
                LEMMAS[subject][1](proof, function)
            return proof
        run(proof, function, lambda: facts_of(proof, subject, mode))
        if is_whole and mode.get("segments") != "any":
            once.check(proof)
    except FailedError as error:
        proof.failure = str(error)
    return proof


def lines_of(subject: str, mode: dict[str, Any]) -> tuple[bool, str]:
    words = [f"{name}={value}" for name, value in mode.items()]
    proof = proof_of(subject, mode)
    said = f"not proved: {proof.failure}" if proof.failure else f"{proof.proved} claims proved"
    return bool(proof.failure), f"{' '.join([subject, *words])}: {said}"
