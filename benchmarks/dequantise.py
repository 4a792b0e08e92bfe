"""How fast packed weights become float32: fastlora, by blocks of rows, beside the vendor's call."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.blocks import buffer_for, widened
from fastlora.quant import quantised_weight

from .cases import F32, Case
from .measure import Rounds, Step, row_of
from .quantised import layer_of

_GGUF = ("q8_0", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
_KINDS = (
    *("nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "torchao-float8", "float8", "hqq"),
    *(f"gguf-{name}" for name in _GGUF),
)


@dataclass(frozen=True)
class Format(Case):
    """A weight [N, K] of a ``kind`` of the makers in ``tests/support``; M and r mean nothing."""

    table: str = "dequantise"

    @property
    def id(self) -> str:
        return f"{self.name}-{self.kind}-{self.outputs[0]}x{self.K}"

    @property
    def targets(self) -> list[tuple[str, str, float]]:
        return []


def cases() -> Iterator[Format]:
    for kind in _KINDS:
        yield Format(0, 256, (96,), 0, F32, F32, name="quick-dequantise", kind=kind)
        yield Format(0, 2048, (2048,), 0, F32, F32, name="dequantise", kind=kind)


def measure(case: Format, run: Callable[[Rounds], None]) -> dict:
    """A row, with the bytes of float32 that one call writes.

    fastlora's numbers must be the vendor's.  A copy of float32 is the yardstick.
    """
    layer = layer_of(case.kind, case.K, *case.outputs, F32)
    weight, theirs = quantised_weight(layer).weight, vendor_call(case.kind, layer)
    buffer, failures, summary = buffer_for(weight, F32), {}, {}
    expected = theirs().view(weight.shape)
    source, target = expected.clone(), torch.empty_like(expected)

    def ours() -> None:
        for _ in widened(weight, buffer):
            pass

    calls = {"copy": lambda: target.copy_(source), "vendor": theirs, "fastlora": ours}
    if all(_same(case, some, expected[rows]) for rows, some in widened(weight, buffer)):
        rounds = Rounds({name: _timed(call) for name, call in calls.items()})
        with torch.no_grad():
            run(rounds)
        summary = rounds.summary()
    else:
        failures["fastlora"] = "its numbers are not the vendor's"
    known = {"errors": {}, "saved": {}, "failures": failures, "written": expected.nbytes}
    return row_of(case, summary, **known)


def vendor_call(kind: str, layer: nn.Module) -> Callable[[], Tensor]:
    """What dequantises the whole weight to float32, as the vendor has it."""
    weight = layer.weight if kind != "hqq" else None
    if kind in ("nf4", "fp4", "int8"):
        from bitsandbytes import functional

        if kind == "int8":
            return lambda: functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        return lambda: functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "hqq":
        return layer.dequantize
    if kind == "float8":
        from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

        scales, block = layer.weight_scale_inv, layer.block_size
        return lambda: _dequantize_fp8_weight(weight, scales, block, F32)
    if kind.startswith("gguf"):
        from transformers.integrations.gguf.dequant import dequantize

        return lambda: dequantize(weight, layer.ggml_type, F32)
    return weight.dequantize


def _same(case: Format, ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, but for LLM.int8.

    There fastlora multiplies as bitsandbytes' backward does: scale · 1/127 first.  Its call for the
    whole weight has another order, and so another rounding.
    """
    if case.kind == "int8":
        return torch.allclose(ours, theirs, rtol=2**-22, atol=0.0)
    return torch.equal(ours, theirs)


def _timed(call: Callable[[], object]) -> Step:
    def step() -> dict[str, float]:
        start = time.perf_counter()
        call()
        return {"dequantise": time.perf_counter() - start}

    return step
