"""What is measured: every size, dtype, dropout and target of the suite comes from these tables."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
DROPOUTS = (0.0, 0.1)

SAME_DTYPE = "fastlora, same dtype"  # beside float32 adapters: fastlora with adapters in x's dtype
OVER_PEFT, OVER_SAME_DTYPE = "fastlora/peft", f"fastlora/{SAME_DTYPE}"
OVER_FROZEN, PEFT_OVER_FROZEN = "fastlora/frozen", "peft/frozen"


@dataclass(frozen=True)
class Model:
    """The sizes of a transformer block, from the model's config.json, and the tokens of a step."""

    tokens: int
    hidden: int
    query: int  # heads · head_dim
    key: int  # key-value heads · head_dim, and the same for the values
    mlp: int


MODELS = {
    "gemma3-270m": Model(tokens=1024, hidden=640, query=1024, key=256, mlp=2048),
    "qwen3-0.6b": Model(tokens=512, hidden=1024, query=2048, key=1024, mlp=3072),
    "llama3.2-1b": Model(tokens=512, hidden=2048, query=2048, key=512, mlp=8192),
}


@dataclass(frozen=True)
class Target:
    """An upper limit for the median of one ratio of one quantity ("forward", "both" …)."""

    quantity: str
    ratio: str
    limit: float


@dataclass(frozen=True)
class Case:
    """One row: x [M, K], a weight [N, K] for each N of ``outputs``, and their adapters."""

    M: int
    K: int
    outputs: tuple[int, ...]
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: float
    name: str = ""

    @property
    def id(self) -> str:
        parts = [self.name] if self.name else []
        parts += [f"{self.M}x{self.K}x{'+'.join(map(str, self.outputs))}", DTYPE_NAMES[self.dtype]]
        if self.mixed:
            parts.append("f32adapter")
        return "-".join([*parts, f"r{self.r}", f"p{self.dropout:g}"])

    @property
    def mixed(self) -> bool:
        return self.adapter_dtype != self.dtype

    @property
    def quick(self) -> bool:
        return self.name.startswith("quick")

    @property
    def targets(self) -> tuple[Target, ...]:
        """Quick rows are too short to have any."""
        if self.quick:
            return ()
        targets = [Target("both", OVER_PEFT, 1.0)]
        if self.mixed:
            targets.append(Target("both", OVER_SAME_DTYPE, 1.05))
        elif (
            limit := _OVER_FROZEN.get((self.M, self.K, *self.outputs, self.dtype, self.dropout))
        ) is not None:
            targets.append(Target("both", OVER_FROZEN, limit))
        return tuple(targets)


_OVER_FROZEN = {
    (2048, 2048, 2048, torch.float32, 0.0): 1.08,
    (2048, 2048, 2048, torch.float32, 0.1): 1.25,
    (2048, 2048, 2048, torch.bfloat16, 0.0): 1.25,
    (2048, 2048, 2048, torch.bfloat16, 0.1): 1.9,
    (4096, 1024, 1024, torch.bfloat16, 0.0): 1.45,
    (4096, 1024, 1024, torch.bfloat16, 0.1): 2.4,
}


def all_cases() -> list[Case]:
    both, half = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    cases = [
        *_cases("quick", 64, 48, (80,), both, r=8),
        *_cases("quick-qkv", 64, 48, (64, 32, 32), half, r=8),
    ]
    for M, K, N in ((2048, 2048, 2048), (4096, 1024, 1024), (512, 4096, 4096)):
        cases += _cases("", M, K, (N,), both)
    for M in (1, 16):
        for size in (1024, 2048):
            cases += _cases("", M, size, (size,), both)
    for name, model in MODELS.items():
        cases += _cases(f"{name}-q", model.tokens, model.hidden, (model.query,), half)
        cases += _cases(f"{name}-up", model.tokens, model.hidden, (model.mlp,), half)
        cases += _cases(f"{name}-down", model.tokens, model.mlp, (model.hidden,), half)
    llama, gemma = MODELS["llama3.2-1b"], MODELS["gemma3-270m"]
    cases += _cases(
        "llama3.2-1b-qkv", llama.tokens, llama.hidden, (llama.query, llama.key, llama.key), half
    )
    cases += _cases("gemma3-270m-gateup", gemma.tokens, gemma.hidden, (gemma.mlp, gemma.mlp), half)
    return cases


def overhead_cases() -> list[Case]:
    """A layer so small that only the cost of the call is left."""
    return [
        Case(8, 64, (64,), 8, torch.float32, torch.float32, dropout, "overhead")
        for dropout in DROPOUTS
    ]


def _cases(
    name: str,
    M: int,
    K: int,
    outputs: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    r: int = 16,
) -> Iterator[Case]:
    for dtype in dtypes:
        for adapter_dtype in sorted({dtype, torch.float32}, key=lambda adapter: adapter != dtype):
            for dropout in DROPOUTS:
                yield Case(M, K, outputs, r, dtype, adapter_dtype, dropout, name)
