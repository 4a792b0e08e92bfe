"""Modeled bytes of a layer's forward and backward, for fastlora and other projects, without a GPU.

``python benchmarks/counted_bytes.py`` prints the table of README.md.  Each kernel reads or writes
a matrix once, as if the caches held a tile until its last use.  Caches keep nothing from one kernel
to the next.  A real kernel moves more, so only a measurement on a GPU gives the real number.

fastlora's rows add up the numbers that its launches state, on tensors without data.  Tests compare
these numbers with every load and store of the kernels.  torch's products count as their arguments
and result.  The rows of other projects are the passes below, read from their sources.
"""

import re
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.backends import triton as backend
from fastlora.backends.protocol import BackwardCall, Call
from fastlora.call.projection import Layout
from fastlora.call.rows import Rows
from fastlora.kernels.launch import intercept
from fastlora.kernels.plan import FUSED, IN_PLACE, Plan, use_plan
from fastlora.kernels.target import TARGETS, use_target

# torch's operations that move no bytes.
FREE = ("t", "permute", "transpose", "split", "empty", "new_empty", "empty_like")


@dataclass(frozen=True)
class Shape:
    """x [M, K] in bfloat16, and weights [N, K] with adapters of rank r, one for each expert."""

    M: int = 8192
    N: int = 4096
    K: int = 4096
    r: int = 16
    experts: int = 0


@dataclass(frozen=True)
class Bytes:
    forward: int
    backward: int
    partial: int | None = None  # partial sums, included in the others; None: not separated

    @property
    def both(self) -> int:
        return self.forward + self.backward


# A pass is one kernel: the matrices that it reads -> the matrices that it writes.  A name on both
# sides is read and written.
#   x, y: input, output.
#   W, A, B: weight, lora_A, lora_B.
#   h: x A, or xd A with dropout.
#   l: h B, the adapter's output.
#   xd: the copy of x after dropout.
#   mask: the dropout mask.
#   dx, dy, dxd, …: the gradients of x, y, xd, ….
#   x32, h32, …: float32 copies of x, h, ….
FORWARD = "x W -> y, x A -> h, y h B -> y"
DROPOUT, DROPOUT_BACKWARD = "x -> xd mask", "dxd mask -> dxd"
PEFT_BACKWARD = "dy -> dl, dl B -> dh, dl h -> dB, dh A -> dxd, dh xd -> dA, dy W -> dx"
ADAPTERS_FIRST = "dy B -> dh, x dh -> dA, x A -> h, h dy -> dB"
PEFT = (
    f"x W -> y, {DROPOUT}, xd A -> h, h B -> l, l -> l, y l -> y",
    f"{PEFT_BACKWARD}, {DROPOUT_BACKWARD}, dx dxd -> dx",
)
WIDE = {"plan": FUSED, "dropout": 0.1, "adapter_dtype": torch.float32}
# A row is the passes of a forward and of a backward, or the settings of fastlora's call.
ROWS: dict[str, tuple[str, str] | dict] = {
    "frozen layer, no adapter": ("x W -> y", "dy W -> dx"),
    "minimum: all inputs and results once": ("x W A B -> y", "x dy W A B -> dx dA dB"),
    "fastlora, fused": {"plan": FUSED},
    "fastlora, fused, dropout": {"plan": FUSED, "dropout": 0.1},
    "fastlora, fused, float32 adapters, dropout": WIDE,
    "fastlora, in place, dropout": {"plan": IN_PLACE, "dropout": 0.1},
    "LoRAFusion, dropout": (
        f"{DROPOUT}, xd A -> h, x W h B -> y",
        "-> dh32 dB32, dy h B -> dh32 dB32, dh32 -> dh, dB32 -> dB, dh xd -> dA, "
        "dy W dh A mask -> dx",
    ),
    "Unsloth, no dropout": (FORWARD, f"{ADAPTERS_FIRST}, dy W -> dx, dy B -> dh, dx dh A -> dx"),
    "axolotl, no dropout": (FORWARD, f"{ADAPTERS_FIRST}, dy W -> dx, dx dh A -> dx"),
    "axolotl, dropout": (
        f"{DROPOUT}, x W -> y, xd A -> h, y h B -> y",
        f"{ADAPTERS_FIRST}, dy W -> dx, dh A -> dxd, dxd -> dxd, {DROPOUT_BACKWARD}, dx dxd -> dx",
    ),
    "PEFT, no dropout": (
        "x W -> y, x A -> h, h B -> l, l -> l, y l -> y",
        f"{PEFT_BACKWARD}, dx dxd -> dx",
    ),
    "PEFT, dropout": PEFT,
    "PEFT, float32 adapters, dropout": (
        "x W -> y, x -> x32, x32 -> xd32 mask, xd32 A32 -> h32, h32 B32 -> l32, l32 -> l32, "
        "y l32 -> y32, y32 -> y",
        "dy -> dy32, dy32 -> dy, dy32 -> dl32, dl32 B32 -> dh32, dl32 h32 -> dB32, "
        "dh32 A32 -> dxd32, dh32 xd32 -> dA32, dxd32 mask -> dx32, dx32 -> dxd, dy W -> dx, "
        "dx dxd -> dx",
    ),
}  # fmt: skip

# q, k and v: three weights of one x, and two sums of dx.
GROUP, SUMS = 3, " dx dx -> dx" * 2
GROUP_ROWS: dict[str, tuple[str, str] | dict] = {
    "frozen q, k, v": (GROUP * " x W -> y", GROUP * " dy W -> dx" + SUMS),
    "fastlora q, k, v, fused, dropout": {"plan": FUSED, "dropout": 0.1, "projections": GROUP},
    "Unsloth q, k, v, no dropout": (
        GROUP * f" {FORWARD}",
        GROUP * f" {ADAPTERS_FIRST}, dy B -> dh, dx dh A -> dx"
        + " dy W -> dx, dy W dx -> dx, dy W dx -> dx",
    ),
    "PEFT q, k, v, dropout": (GROUP * f" {PEFT[0]}", GROUP * f" {PEFT[1]}" + SUMS),
}


# Experts: 4096 tokens, each for 8 of 128, sorted by expert.
EXPERTS = Shape(M=8 * 4096, N=1536, K=2048, experts=128)
EXPERT_ROWS: dict[str, tuple[str, str] | dict] = {
    "frozen experts": ROWS["frozen layer, no adapter"],
    "minimum of experts: all inputs and results once": ROWS["minimum: all inputs and results once"],
    "fastlora experts, fused": {"plan": FUSED},
    "fastlora experts, fused, float32 adapters, dropout": WIDE,
}


def bytes_of_passes(passes: tuple[str, str], shape: Shape) -> Bytes:
    """The bytes of these passes.  A gradient has its tensor's shape."""
    M, N, K, r, stacked = shape.M, shape.N, shape.K, shape.r, shape.experts or 1
    counts = {"x": M * K, "xd": M * K, "W": N * K, "A": r * K, "B": N * r, "h": M * r}
    counts |= {name: counts[name] * stacked for name in "WAB"}
    counts |= {"l": M * N, "y": M * N}

    def matrix(name: str) -> int:
        size = 4 if name.endswith("32") else 2
        return M * K if name == "mask" else counts[name.removesuffix("32").removeprefix("d")] * size

    return Bytes(*(sum(map(matrix, re.findall(r"\w+", steps))) for steps in passes))


def bytes_of_fastlora(
    shape: Shape, plan: Plan, *, dropout: float = 0.0, projections: int = 1,
    adapter_dtype: torch.dtype = torch.bfloat16,
) -> Bytes:  # fmt: skip
    """The bytes of a forward and a backward on sm_90, with gradients of x and of the adapters."""
    banks = [shape.experts] if shape.experts else []
    with torch.device("meta"):
        x = torch.empty(shape.M, shape.K, dtype=torch.bfloat16)
        weight = torch.empty(*banks, shape.N, shape.K, dtype=torch.bfloat16)
        lora_a = torch.empty(*banks, shape.r, shape.K, dtype=adapter_dtype)
        lora_b = torch.empty(*banks, shape.N, shape.r, dtype=adapter_dtype)
        rows = Rows(torch.empty(shape.experts, dtype=torch.int32)) if shape.experts else None
        seeds = torch.empty(projections, dtype=torch.int64) if dropout else None
    inputs = [x, *[weight, lora_a, lora_b] * projections]
    needs = [True, *[False, True, True] * projections]
    call = Call((Layout(False, (1.0,), None),) * projections, dropout, backend, rows)
    with use_target(TARGETS["sm_90"]), use_plan(plan):
        with _Counter() as forward, intercept(forward.add_launch):
            ys, hs = backend.forward(inputs, seeds, call)
        with _Counter() as backward, intercept(backward.add_launch):
            backend.backward(BackwardCall(ys, inputs, hs, needs, seeds, call))
    return Bytes(forward.moved, backward.moved, forward.partial + backward.partial)


class _Counter(TorchDispatchMode):
    """Adds up the bytes that Triton launches state, and the bytes of torch's products."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.partial = 0

    def add_launch(self, launch) -> None:
        work = launch.work()
        self.moved += work.loaded + work.stored
        self.partial += work.partial

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        result = operation(*arguments, **named)
        name = operation.overloadpacket.__name__
        if name in ("mm", "addmm"):
            read = arguments[1:] if named.get("beta") == 0.0 else arguments
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*read, result))
        elif name not in FREE:
            raise NotImplementedError(f"{name} isn't counted: add its bytes to _Counter")
        return result


def table() -> str:
    """The Markdown table.  Each block of rows is compared with its first row, the frozen layers."""
    lines = [
        "| | forward, MiB | backward, MiB | of both, partial sums | both, × frozen |",
        "|---|---|---|---|---|",
    ]
    for rows, shape in ((ROWS, Shape()), (GROUP_ROWS, Shape()), (EXPERT_ROWS, EXPERTS)):
        frozen = bytes_of_passes(next(iter(rows.values())), shape)
        for name, row in rows.items():
            is_ours = isinstance(row, dict)
            count = bytes_of_fastlora(shape, **row) if is_ours else bytes_of_passes(row, shape)
            cells = [f"{each / 2**20:.1f}" for each in (count.forward, count.backward)]
            cells += ["–" if count.partial is None else f"{count.partial / 2**20:.1f}"]
            lines.append(f"| {name} | {' | '.join(cells)} | {count.both / frozen.both:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
