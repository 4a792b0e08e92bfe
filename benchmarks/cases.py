"""What is measured: every size, dtype, dropout and target comes from these tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

F32, BF16 = torch.float32, torch.bfloat16
DTYPE_NAMES = {F32: "f32", BF16: "bf16"}
DROPOUTS = (0.0, 0.1)
SAME_DTYPE = "fastlora, same dtype"  # beside float32 adapters: fastlora with adapters in x's dtype
DECODE = 16


@dataclass(frozen=True)
class Model:
    """The sizes of a transformer block, from the model's config.json, and the tokens of a step."""

    tokens: int
    hidden: int
    query: int  # heads · head_dim
    key: int  # key-value heads · head_dim, and the same for the values
    mlp: int

    @property
    def qkv(self) -> tuple[int, ...]:
        return (self.query, self.key, self.key)

    @property
    def gate_up(self) -> tuple[int, ...]:
        return (self.mlp, self.mlp)


MODELS = {
    "gemma3-270m": Model(tokens=1024, hidden=640, query=1024, key=256, mlp=2048),
    "qwen3-0.6b": Model(tokens=512, hidden=1024, query=2048, key=1024, mlp=3072),
    "llama3.2-1b": Model(tokens=512, hidden=2048, query=2048, key=512, mlp=8192),
}
GPU_MODELS = {
    "llama3-8b": Model(tokens=8192, hidden=4096, query=4096, key=1024, mlp=14336),
    "gemma3-4b": Model(tokens=8192, hidden=2560, query=2048, key=1024, mlp=10240),
}


@dataclass(frozen=True)
class Target:
    """An upper limit for the median of one ratio of one quantity ("forward", "both" …)."""

    quantity: str
    ratio: str
    limit: float


@dataclass(frozen=True)
class Case:
    """One row: x [M, K], a weight [N, K] for each N of ``outputs``, and their adapters.

    ``table``: the row's place in the report, and who takes part (``contestants.py``).  ``kind`` of
    PEFT's layers: lora, dora, or two-adapters, both active.
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
    compiled: bool = False  # torch.compile takes part: for few rows, since it compiles for long

    @property
    def id(self) -> str:
        parts = [self.name] * bool(self.name) + [self.kind] * (self.table == "optimized")
        parts += [f"{self.M}x{self.K}x{'+'.join(map(str, self.outputs))}", DTYPE_NAMES[self.dtype]]
        parts += ["f32adapter"] * self.mixed + [f"r{self.r}", f"p{self.dropout:g}"]
        return "-".join(parts)

    @property
    def mixed(self) -> bool:
        return self.adapter_dtype != self.dtype

    @property
    def decodes(self) -> bool:
        """On a GPU few rows are inference, without gradients and in a CUDA graph as well."""
        return self.table == "gpu" and self.M <= DECODE

    @property
    def tiny(self) -> bool:
        """For the question whether everything works: its times mean nothing."""
        return self.name.startswith("quick")

    @property
    def targets(self) -> tuple[Target, ...]:
        if self.tiny:
            return ()
        if self.table == "gpu":
            return self._targets_of_gpu()
        quantities = ("forward", "inference", "both") if self.table == "overhead" else ("both",)
        targets = [Target(quantity, "fastlora/peft", 1.0) for quantity in quantities]
        key = (self.M, self.K, *self.outputs, self.dtype, self.dropout)
        if self.table == "layers" and self.mixed:
            targets.append(Target("both", f"fastlora/{SAME_DTYPE}", 1.05))
        elif self.table == "layers" and key in _OVER_FROZEN:
            targets.append(Target("both", "fastlora/frozen", _OVER_FROZEN[key]))
        return tuple(targets)

    def _targets_of_gpu(self) -> tuple[Target, ...]:
        if self.decodes:
            return (Target("graph", "fastlora/merged", 1.03),)
        host = Target("wall", "fastlora/peft", 0.75)
        if self.M < 4096 or self.r != 16:
            return (host,)
        square, group = self.outputs == (self.K,), len(self.outputs) > 1
        limit = 1.15 if square else 1.10 if group else 1.08
        return host, Target("both", "fastlora/frozen", limit), Target("both", "fastlora/peft", 0.77)


_OVER_FROZEN = {
    (2048, 2048, 2048, F32, 0.0): 1.08,
    (2048, 2048, 2048, F32, 0.1): 1.25,
    (2048, 2048, 2048, BF16, 0.0): 1.25,
    (2048, 2048, 2048, BF16, 0.1): 1.9,
    (4096, 1024, 1024, BF16, 0.0): 1.45,
    (4096, 1024, 1024, BF16, 0.1): 2.4,
}


def cpu_cases() -> list[Case]:
    cases = [*_layers("quick", 64, 48, (80,), (F32, BF16), r=8)]
    cases += _layers("quick-qkv", 64, 48, (64, 32, 32), r=8)
    squares = (2048, 2048), (4096, 1024), (512, 4096), (1, 1024), (1, 2048), (16, 1024), (16, 2048)
    for M, size in squares:
        cases += _layers("", M, size, (size,), (F32, BF16))
    for name, model in MODELS.items():
        cases += _layers(f"{name}-q", model.tokens, model.hidden, (model.query,))
        cases += _layers(f"{name}-up", model.tokens, model.hidden, (model.mlp,))
        cases += _layers(f"{name}-down", model.tokens, model.mlp, (model.hidden,))
    llama, gemma = MODELS["llama3.2-1b"], MODELS["gemma3-270m"]
    cases += _layers("llama3.2-1b-qkv", llama.tokens, llama.hidden, llama.qkv)
    cases += _layers("gemma3-270m-gateup", gemma.tokens, gemma.hidden, gemma.gate_up)
    for dropout in DROPOUTS:
        cases += _optimized(dropout)
    # A layer so small that only the cost of the call is left.
    tiny = Case(8, 64, (64,), 8, F32, F32, name="overhead", table="overhead")
    return [*cases, tiny, replace(tiny, dropout=0.1)]


def gpu_cases() -> list[Case]:
    """In the order of importance, for the time of a visit may run out."""
    llama, gemma = GPU_MODELS["llama3-8b"], GPU_MODELS["gemma3-4b"]
    main = _gpu("llama3-8b-q", 8192, 4096, (4096,))
    return [
        *(replace(case, compiled=True) for case in main),
        *_gpu("llama3-8b-qkv", 8192, 4096, llama.qkv),
        *_gpu("llama3-8b-q", 16, 4096, (4096,)),
        *_gpu("llama3-8b-gateup", 8192, 4096, llama.gate_up),
        *_gpu("llama3-8b-q", 1, 4096, (4096,)),
        *_gpu("llama3-8b-q", 256, 4096, (4096,)),
        *_gpu("llama3-8b-down", 8192, llama.mlp, (4096,)),
        *_gpu("llama3-8b-q", 8192, 4096, (4096,), r=64),
        *_gpu("gemma3-4b-qkv", 8192, gemma.hidden, gemma.qkv),
        *_gpu("llama3-8b-q", 8192, 4096, (4096,), r=128),
    ]


def dry_cases() -> list[Case]:
    """Those of a GPU, so small that the interpreter can run their kernels."""
    return [
        replace(_gpu("quick-gpu", 34, 40, (48,), r=8)[1], compiled=True),
        _gpu("quick-gpu-qkv", 34, 40, (48, 24), r=8)[0],
        *_gpu("quick-gpu-decode", 2, 40, (48,), r=8),
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
    for name, model in MODELS.items():
        sizes = (model.tokens, model.hidden, model.qkv + model.gate_up, 16, BF16)
        for adapter_dtype in (F32, BF16):
            yield Case(*sizes, adapter_dtype, name=f"{name}-block", **shared)
    for kind in ("dora", "two-adapters"):
        for dtype in (F32, BF16):
            yield Case(1024, 1024, (1024,), 16, dtype, F32, name="layer", kind=kind, **shared)


def _gpu(name: str, M: int, K: int, outputs: tuple[int, ...], r: int = 16) -> list[Case]:
    dropouts = DROPOUTS if M > DECODE else (0.0,)
    return [Case(M, K, outputs, r, dropout=dropout, name=name, table="gpu") for dropout in dropouts]
