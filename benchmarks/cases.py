"""What is measured: every size, dtype and dropout comes from these tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

F32, BF16 = torch.float32, torch.bfloat16
DTYPE_NAMES = {F32: "f32", BF16: "bf16"}
DROPOUTS = (0.0, 0.1)
SAME_DTYPE = "fastlora, same dtype"  # beside float32 adapters: fastlora with adapters in x's dtype
ADAPTERS = 8  # of a mixed batch, a sequence each
BLOCKS = ("experts", "mlp", "step")
PACKS = ("mxfp4", "nvfp4", "nf4", "fp8")  # those of fastlora.pack


@dataclass(frozen=True)
class Case:
    """One row: x [M, K], a weight [N, K] for each N of ``outputs``, and their adapters.

    ``table``: the row's place in the report, and who takes part (``lineup.py``).  ``kind``: of
    PEFT's layers lora, dora, or two-adapters, both active; in the table "quantised" that of
    the makers in ``tests/support``.  In the table "mixed" x is a sequence for each of ``ADAPTERS``.

    The tables of ``BLOCKS`` are more than a layer: experts, mlp (gated), or step (of a model's
    training).  An MLP, or an expert, is K -> ``inner`` -> K.  Each token has ``top`` of the
    ``experts``, which are packed if the kind is one of ``PACKS``; then the others have the weights
    that these stand for.  A step is that of a model of so many ``layers``.
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
    inner: int = 0
    experts: int = 0
    top: int = 0
    layers: int = 0

    @property
    def id(self) -> str:
        parts = [self.name] * bool(self.name) + [self.table] * self.is_block
        parts += [self.kind] * (self.table in ("optimized", "quantised") or self.kind in PACKS)
        parts += [f"{self.M}x{self.K}x{self.inner or '+'.join(map(str, self.outputs))}"]
        parts += [f"{self.experts}top{self.top}"] * (self.experts > 0)
        parts += [f"{self.layers}layers"] * (self.layers > 0) + [DTYPE_NAMES[self.dtype]]
        parts += ["f32adapter"] * self.mixed + [f"r{self.r}", f"p{self.dropout:g}"]
        return "-".join(parts)

    @property
    def mixed(self) -> bool:
        return self.adapter_dtype != self.dtype

    @property
    def is_block(self) -> bool:
        return self.table in BLOCKS

    @property
    def by_peft(self) -> bool:
        """Whether all are PEFT's modules, or such optimised: in float64 they are the truth."""
        return self.table == "optimized" or self.is_block

    @property
    def has_peak(self) -> bool:
        """Whether the most memory of a step is measured, besides what is kept."""
        return self.table == "quantised" or self.is_block

    @property
    def tiny(self) -> bool:
        """For the question whether everything works: its times mean nothing."""
        return self.name.startswith("quick")


_QUANTISED = ("nf4", "int8", "torchao-int8", "gguf-q8_0", "gguf-q4_k")
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
    layers: list[Case] = []
    for name, (M, hidden, query, _, mlp) in _MODELS.items():
        layers += _layers(f"{name}-q", M, hidden, (query,))
        layers += _layers(f"{name}-up", M, hidden, (mlp,))
        layers += _layers(f"{name}-down", M, mlp, (hidden,))
    layers += _layers("llama3.2-1b-qkv", 512, 2048, (2048, 512, 512))
    layers += _layers("gemma3-270m-gateup", 1024, 640, (2048, 2048))
    # PEFT's adapters are float32; fastlora's of x's dtype are timed beside them.
    cases += [case for case in layers if case.mixed]
    for dropout in DROPOUTS:
        cases += _optimized(dropout)
        for K in (256, 1024, 2048):
            for M in (1, 16):
                cases.append(Case(M, K, (K,), 16, F32, F32, dropout, "few", "few"))
    for name, M, size in (("quick-mixed", 32, 48), ("mixed", 512, 2048)):
        cases.append(Case(M, size, (size,), 8 if M < 64 else 16, F32, F32, 0.0, name, "mixed"))
    return [*cases, *_blocks(), *_quantised()]


def _quantised() -> Iterator[Case]:
    for kind in _QUANTISED:
        yield Case(34, 256, (96,), 8, F32, F32, 0.1, "quick-quantised", "quantised", kind)
        case = Case(512, 2048, (2048,), 16, F32, F32, 0.1, "quantised", "quantised", kind)
        yield from (replace(case, M=M) for M in (512, 64, 2048))
        yield replace(case, dtype=BF16, adapter_dtype=BF16)


def _blocks() -> Iterator[Case]:
    """In float32, which every CPU multiplies fast."""
    of_experts = Case(512, 1024, (1024,), 8, F32, F32, table="experts")
    for M, experts, inner, top in ((512, 32, 384, 4), (2048, 32, 384, 4), (512, 8, 2048, 2)):
        yield replace(of_experts, M=M, inner=inner, experts=experts, top=top)
    quick = {"M": 34, "name": "quick", "experts": 4, "top": 2}
    yield replace(of_experts, K=48, outputs=(48,), inner=24, **quick)
    for kind in PACKS:
        yield replace(of_experts, kind=kind, inner=384, experts=32, top=4)
    yield replace(of_experts, K=64, outputs=(64,), kind="mxfp4", inner=32, **quick)
    tokens, hidden, _, _, inner = _MODELS["qwen3-0.6b"]
    for name, *sizes, layers in (
        ("quick", 34, 48, 64, 2),
        ("qwen3-0.6b", tokens, hidden, inner, 4),
    ):
        M, K, inner = sizes
        mlp = Case(M, K, (K,), 16, F32, F32, name=name, table="mlp", inner=inner)
        yield from (replace(mlp, dropout=p) for p in (0.1, 0.0))
        yield from (replace(mlp, table="step", layers=layers, dropout=p) for p in (0.05, 0.0))


def gpu_cases() -> list[Case]:
    """In the order of importance, for the time of a visit may run out."""
    layers = (
        ("llama3-8b-q", 8192, 4096, (4096,)),
        ("qwen3-0.6b-q", 8192, 1024, (2048,)),
        ("llama3-8b-q", 512, 4096, (4096,)),
        ("llama3-8b-up", 8192, 4096, (14336,)),
        ("llama3-8b-qkv", 8192, 4096, (4096, 1024, 1024)),
        ("llama3-8b-q", 16, 4096, (4096,)),
        ("llama3-8b-down", 8192, 14336, (4096,)),
        ("llama3-8b-q", 8192, 4096, (4096,), 64),
    )
    return [Case(*sizes, dropout=p, name=n, table="gpu") for p in DROPOUTS for n, *sizes in layers]


def host_cases() -> list[Case]:
    """Rows of x decide what is launched; the layer's sizes hardly do."""
    layers = [("layer", (2048,)), ("qkv", (2048, 512, 512))]
    cases = [Case(512, 2048, out, 16, BF16, F32, name=name, table="host") for name, out in layers]
    return [
        replace(each, M=M, dropout=p) for each in cases for p in DROPOUTS for M in (16, 512, 4096)
    ]


def dry_cases() -> list[Case]:
    """Those of a GPU, so small that the interpreter can run their kernels."""
    return [
        Case(34, 40, (48,), 8, dropout=0.1, name="quick-gpu", table="gpu"),
        Case(34, 40, (48, 24), 8, name="quick-gpu-qkv", table="gpu"),
        Case(2, 40, (48,), 8, name="quick-gpu-few", table="gpu"),
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
    """PEFT's own: a block's q, k, v, gate and up projections; layers of the less usual kinds."""
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
