"""The benchmark cases: every size, dtype, dropout and target comes from these tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

F32, BF16 = torch.float32, torch.bfloat16
DTYPE_NAMES = {F32: "f32", BF16: "bf16"}
DROPOUTS = (0.0, 0.1)
DECODE = 16
ADAPTERS = 8  # in a mixed batch, with one sequence each
BLOCKS = ("experts", "mlp", "projections", "step")
PACKS = ("mxfp4", "nvfp4", "nf4", "fp8")  # the kinds of fastlora.pack


@dataclass(frozen=True)
class Case:
    """One row: x [M, K], a weight [N, K] for each N of ``outputs``, and their adapters.

    ``table`` is the row's table in the report, and selects the contestants (``lineup.py``).
    ``kind`` is the kind of PEFT's layers: lora, dora, or two-adapters, both active.  In the table
    "quantized" it is a kind of the makers in ``tests/support``.  In the table "mixed", x has one
    sequence for each of ``ADAPTERS``.  In the table "8 bits", and in a step of this kind,
    fastlora's base products are of 8 bits.

    ``BLOCKS`` are larger than a layer: experts, mlp (gated), all projections of a Llama layer, or
    step (of a model's training).  Each is a table, or a kind in the table "host".  An MLP, or an
    expert, is K -> ``inner`` -> K.  Each token has ``top`` of the ``experts``.  If the kind is one
    of ``PACKS``, fastlora's experts are packed, and the others have their dequantized weights.  A
    step trains a model with ``layers`` layers.
    """

    M: int
    K: int
    outputs: tuple[int, ...]
    r: int = 16
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = BF16
    dropout: float = 0.0
    name: str = ""
    table: str = "layers"
    kind: str = "lora"
    limits: tuple[tuple[str, str, float], ...] = ()  # more targets
    inner: int = 0
    experts: int = 0
    top: int = 0
    layers: int = 0

    @property
    def id(self) -> str:
        parts = [each for each in (self.name, self.block) if each]
        parts += [self.kind] * (self.table in ("optimized", "quantized") or self.kind in PACKS)
        parts += [f"{self.M}x{self.K}x{self.inner or '+'.join(map(str, self.outputs))}"]
        parts += [f"{self.experts}top{self.top}"] * (self.experts > 0)
        parts += [f"{self.layers}layers"] * (self.layers > 0) + [DTYPE_NAMES[self.dtype]]
        parts += ["f32adapter"] * self.mixed + [f"r{self.r}", f"p{self.dropout:g}"]
        return "-".join(parts)

    @property
    def mixed(self) -> bool:
        return self.adapter_dtype != self.dtype

    @property
    def block(self) -> str:
        """One of ``BLOCKS``, or "" for a layer."""
        name = self.kind if self.table == "host" else self.table
        return name if name in BLOCKS else ""

    @property
    def by_peft(self) -> bool:
        """Whether all are PEFT's modules, some of them optimized; the oracle is PEFT in float64."""
        return self.table == "optimized" or bool(self.block)

    @property
    def in_8_bits(self) -> bool:
        return "8 bits" in (self.table, self.kind)

    @property
    def has_peak(self) -> bool:
        """Whether a step's peak memory is measured, in addition to the memory that is saved."""
        return self.table == "quantized" or bool(self.block)

    @property
    def decodes(self) -> bool:
        """On a GPU, few rows also measure inference, without gradients and in a CUDA graph."""
        return self.table == "gpu" and self.M <= DECODE

    @property
    def has_no_node(self) -> bool:
        """Whether this is a call of few rows on a CPU, which runs under torch's autograd."""
        from fastlora.backends.products import is_slow  # late: a worker selects its fastlora first

        few = self.M <= 32 and len(self.outputs) == 1 and self.table not in ("gpu", "host")
        return few and self.adapter_dtype == F32 and (self.dtype == F32 or not is_slow(self.dtype))

    @property
    def calls_in_a_row(self) -> int:
        """More than one if the caller's own CPU time is measured, on one thread."""
        return 5 if self.table == "few" else 1

    @property
    def tiny(self) -> bool:
        """Whether the row only checks that everything works: its times mean nothing."""
        return self.name.startswith("quick")

    @property
    def targets(self) -> list[tuple[str, str, float]]:
        """Upper limits of a time's median or of bytes ("kept", "peak"): quantity, ratio, limit."""
        return [] if self.tiny else [*self._usual_targets(), *self.limits]

    def _usual_targets(self) -> list[tuple[str, str, float]]:
        if self.decodes:
            return [("graph", "fastlora/merged", 1.03)]
        if self.has_peak:  # ``limits`` has the targets of blocks and quantized bases
            return []
        if self.table == "host":
            return [("modeled", "fastlora/peft", 0.75 if len(self.outputs) == 1 else 0.45)]
        if self.table == "mixed":
            limits = {"frozen": 1.25, "peft": 1.0, "single calls": 1.0}
            return [("both", f"fastlora/{name}", limit) for name, limit in limits.items()]
        if self.table == "gpu":
            targets = [("wall", "fastlora/peft", 0.75)]
            if self.M >= 4096 and self.r == 16:
                square, group = self.outputs == (self.K,), len(self.outputs) > 1
                limit = 1.15 if square else 1.10 if group else 1.08
                targets += [("both", "fastlora/frozen", limit), ("both", "fastlora/peft", 0.77)]
            return targets
        if self.table == "few":  # with dropout, only the masks are a gain
            quantities = ("both",) if self.dropout else ("forward", "inference", "both")
            limit = 1.2 if self.dropout else 1.0
            return [(quantity, "fastlora/peft", limit) for quantity in quantities]
        targets = [("both", "fastlora/peft", 1.0)]
        if self.id in _OVER_FROZEN:
            targets.append(("both", "fastlora/frozen", _OVER_FROZEN[self.id]))
        return targets


_OVER_FROZEN = {
    "2048x2048x2048-f32-r16-p0": 1.08,
    "2048x2048x2048-f32-r16-p0.1": 1.25,
    "2048x2048x2048-bf16-r16-p0": 1.25,
    "2048x2048x2048-bf16-r16-p0.1": 1.9,
    "4096x1024x1024-bf16-r16-p0": 1.45,
    "4096x1024x1024-bf16-r16-p0.1": 2.4,
}
# For quantized bases: limits of forward + backward as a ratio to the frozen dense layer's, at 512
# rows in float32; and limits of the saved memory, in MiB, including 4 for x.
_OVER_DENSE = {"nf4": 1.2, "int8": 1.15, "torchao-int8": 1.2, "gguf-q8_0": 1.25, "gguf-q4_k": 1.4}
_KEPT = 4.1
_SQUARES = (2048, 2048), (4096, 1024), (512, 4096), (1, 1024), (1, 2048), (16, 1024), (16, 2048)
# From the models' config.json: tokens of a step; sizes of hidden, query, key (or value) and mlp.
_MODELS = {
    "gemma3-270m": (1024, 640, 1024, 256, 2048),
    "qwen3-0.6b": (512, 1024, 2048, 1024, 3072),
    "llama3.2-1b": (512, 2048, 2048, 512, 8192),
}


def cpu_cases() -> list[Case]:
    cases = [*_layers("quick", 64, 48, (80,), (F32, BF16), r=8)]
    cases += _layers("quick-few", 3, 48, (80,), (F32, BF16), r=8)
    cases += _layers("quick-qkv", 64, 48, (64, 32, 32), r=8)
    for M, size in _SQUARES:
        cases += _layers("", M, size, (size,), (F32, BF16))
    groups = [*_layers("llama3.2-1b-qkv", 512, 2048, (2048, 512, 512))]
    groups += _layers("gemma3-270m-gateup", 1024, 640, (2048, 2048))
    cases += [case for case in groups if case.mixed]  # as in PEFT, whose adapters are float32
    for dropout in DROPOUTS:
        cases += _optimized(dropout)
        for K in (256, 1024, 2048):
            for M in (1, 16):
                cases.append(Case(M, K, (K,), 16, F32, F32, dropout, "few", "few"))
    for name, M, size in (("quick-mixed", 32, 48), ("mixed", 512, 2048)):
        cases.append(Case(M, size, (size,), 8 if M < 64 else 16, F32, F32, 0.0, name, "mixed"))
    return [*cases, *_blocks(), *_quantized(), *_in_8_bits()]


def _quantized() -> Iterator[Case]:
    for kind, over_dense in _OVER_DENSE.items():
        yield Case(34, 256, (96,), 8, F32, F32, 0.1, "quick-quantized", "quantized", kind)
        peak = ("peak", "fastlora/peft", 0.6)
        dense, kept = ("both", "fastlora/frozen", over_dense), ("kept", "fastlora/MiB", _KEPT)
        case = Case(512, 2048, (2048,), 16, F32, F32, 0.1, "quantized", "quantized", kind)
        yield replace(case, limits=(peak, dense, kept))
        for M, limit in ((64, 1.05), (2048, 0.85)):
            yield replace(case, M=M, limits=(peak, ("both", "fastlora/peft", limit)))
        yield replace(case, dtype=BF16, adapter_dtype=BF16, limits=(peak,))


def _in_8_bits() -> Iterator[Case]:
    """Layers, and a step of four layers of Llama 3.2 1B's shapes, for a CPU with VNNI."""
    yield Case(34, 64, (80,), 8, BF16, F32, 0.1, "quick-8-bits", "8 bits")
    for M, K, limit in ((512, 2048, 0.84), (512, 4096, 0.64), (4096, 1024, 1.0)):
        for dropout in DROPOUTS:
            limits = (("both", "fastlora/frozen", limit),)
            yield Case(M, K, (K,), 16, BF16, F32, dropout, "8-bits", "8 bits", limits=limits)
    limits = ("both", "fastlora/frozen", 0.8), ("both", "fastlora/peft", 0.55)
    step = Case(512, 2048, (2048,), 16, BF16, F32, 0.05, "llama3.2-1b-8-bits", "step", "8 bits")
    yield replace(step, limits=limits, inner=8192, layers=4)


def _blocks() -> Iterator[Case]:
    """Blocks in float32, because every CPU has fast float32 products."""
    of_experts = ("kept", "fastlora/frozen", 1.0), ("peak", "fastlora/peft", 0.2)
    shared = Case(512, 1024, (1024,), 8, F32, F32, table="experts", inner=384, experts=32, top=4)
    for M, experts, inner, top, limit in (
        (512, 32, 384, 4, 1.25), (2048, 32, 384, 4, 1.15), (512, 8, 2048, 2, 1.25),
    ):  # fmt: skip
        limits = ("both", "fastlora/frozen", limit), *of_experts
        yield replace(shared, M=M, inner=inner, experts=experts, top=top, limits=limits)
    packed = ("both", "fastlora/frozen", 1.45), ("both", "fastlora/peft", 1.0), *of_experts
    yield from (replace(shared, kind=kind, limits=packed) for kind in PACKS)
    quick = replace(shared, M=34, name="quick", experts=4, top=2)
    yield replace(quick, K=48, outputs=(48,), inner=24)
    yield replace(quick, K=64, outputs=(64,), inner=32, kind="mxfp4")
    of_mlp = ("both", "fastlora/layer by layer", 1.0), ("kept", "fastlora/frozen", 0.8)
    of_step = ("both", "fastlora/frozen", 1.07), ("kept", "fastlora/frozen", 1.0)
    for name, M, K, inner, layers in (("quick", 34, 48, 64, 2), ("qwen3-0.6b", 512, 1024, 3072, 4)):
        mlp = Case(M, K, (K,), 16, F32, F32, name=name, table="mlp", limits=of_mlp, inner=inner)
        yield from (replace(mlp, dropout=p) for p in (0.1, 0.0))
        step = replace(mlp, table="step", layers=layers, limits=of_step)
        yield from (replace(step, dropout=p) for p in (0.05, 0.0))


def gpu_cases() -> list[Case]:
    """The most important cases first, because the time of a visit may run out."""
    layers = (
        ("llama3-8b-q", 8192, 4096, (4096,)),
        ("qwen3-0.6b-q", 8192, 1024, (2048,)),
        ("llama3-8b-q", 512, 4096, (4096,)),
        ("llama3-8b-up", 8192, 4096, (14336,)),
        ("llama3-8b-qkv", 8192, 4096, (4096, 1024, 1024)),
        ("llama3-8b-q", DECODE, 4096, (4096,)),
        ("llama3-8b-down", 8192, 14336, (4096,)),
        ("llama3-8b-q", 8192, 4096, (4096,), 64),
    )
    cases = [Case(*sizes, dropout=p, name=n, table="gpu") for p in DROPOUTS for n, *sizes in layers]
    return [case for case in cases if not (case.decodes and case.dropout)]


def host_cases() -> list[Case]:
    """Cases by rows of x, which decide the launches; the layer's sizes hardly matter."""
    layers = [("layer", (2048,)), ("qkv", (2048, 512, 512))]
    cases = [Case(512, 2048, out, 16, BF16, F32, name=name, table="host") for name, out in layers]
    cases = [
        replace(each, M=M, dropout=p) for each in cases for p in DROPOUTS for M in (16, 512, 4096)
    ]
    # Forwards of up to 64 rows are fused.
    for kind, outputs, limit in (
        ("mlp", (512,), 0.65), ("projections", (512, 128, 128, 512, 512), 0.70),
    ):  # fmt: skip
        case = Case(96, 512, outputs, 16, BF16, F32, table="host", kind=kind, inner=2048)
        limits = (("modeled", "fastlora/peft", limit),)
        cases += [replace(case, dropout=p, limits=limits) for p in DROPOUTS]
    step = Case(16, 64, (64,), 16, BF16, F32, 0.05, "trainer", "host", "step", inner=128, layers=32)
    return [*cases, replace(step, limits=(("modeled", "fastlora/peft", 0.70),))]


def dry_cases() -> list[Case]:
    """The cases of a GPU, so small that the interpreter can run their kernels."""
    return [
        Case(34, 40, (48,), 8, dropout=0.1, name="quick-gpu", table="gpu"),
        Case(34, 40, (48, 24), 8, name="quick-gpu-qkv", table="gpu"),
        Case(2, 40, (48,), 8, name="quick-gpu-decode", table="gpu"),
    ]


def _layers(
    name: str, M: int, K: int, outputs: tuple[int, ...], dtypes: Sequence[torch.dtype] = (BF16,),
    r: int = 16,
) -> Iterator[Case]:  # fmt: skip
    for dtype in dtypes:
        for adapter_dtype in dict.fromkeys((dtype, F32)):
            for dropout in DROPOUTS:
                yield Case(M, K, outputs, r, dtype, adapter_dtype, dropout, name)


def _optimized(dropout: float) -> Iterator[Case]:
    """PEFT's layers: a block's q, k, v, gate and up projections, and the less usual kinds."""
    shared = {"dropout": dropout, "table": "optimized"}
    for kind in ("lora", "dora", "two-adapters"):
        yield Case(64, 48, (32, 16), 8, BF16, F32, name="quick", kind=kind, **shared)
    for name, (M, hidden, query, key, mlp) in _MODELS.items():
        outputs = (query, key, key, mlp, mlp)
        for adapter_dtype in (F32, BF16):
            yield Case(M, hidden, outputs, 16, BF16, adapter_dtype, name=f"{name}-block", **shared)
    for kind in ("dora", "two-adapters"):
        for dtype in (F32, BF16):
            yield Case(1024, 1024, (1024,), 16, dtype, F32, name="layer", kind=kind, **shared)
