"""The calls that the compile report looks at: every default config, in the forms of its use."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.kernels import gemm_lowrank, project, weight_grad
from fastlora.kernels.config import Call, Config, GemmConfig, why_not
from fastlora.kernels.defaults import DEFAULTS
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.target import TARGETS, use_target

KERNELS = {
    "y": "gemm_lowrank",  # x weightᵀ + h lora_bᵀ
    "y,h": "gemm_lowrank",  # both in one launch, for few rows
    "dx": "gemm_lowrank",  # Σ dy weight + drop'(dh lora_a)
    "y+": "gemm_lowrank",  # the low-rank term alone, added to what torch multiplied
    "dx+": "gemm_lowrank",
    "h": "project",
    "dh": "project",
    "dA": "weight_grad",
    "dB": "weight_grad",
    "dB,dh": "weight_grad",  # one pass over dy
}


@dataclass(frozen=True)
class Case:
    """One call of a launcher.  ``form``: what the call computes; without a config, the default."""

    target: str
    form: str
    config: Config | None
    dtype: str = "bf16"
    adapter: str = "f32"
    precision: str = "ieee"  # "tf32" for float32 where the target has it
    r: int = 16
    n: int = 1  # projections
    masked: bool = False
    bias: bool = False
    M: int = 8192
    N: int = 4096  # of the output: K = 4096 throughout

    @property
    def kernel(self) -> str:
        return KERNELS[self.form]

    @property
    def call(self) -> Call:
        """As the launcher would make it."""
        itemsize = _DTYPES[self.dtype].itemsize
        return Call(
            self.M, self.N, self.r, itemsize, self.precision, self.n, self.masked,
            project="," in self.form, alone=self.form.endswith("+"),
            pointers=self.form.endswith("+") or self.N * itemsize % 16 != 0,
        )  # fmt: skip

    def fits(self) -> bool:
        return self.config is None or not why_not(self.config, TARGETS[self.target], self.call)

    def __str__(self) -> str:
        flags = ("mask" * self.masked, "bias" * self.bias)
        dtype = f"{self.dtype}-{self.precision}" if self.dtype == "f32" else self.dtype
        words = (
            self.target, self.form, describe(self.config), dtype, f"r{self.r}",
            f"n{self.n}" * (self.n > 1), *flags, f"M{self.M}" * (self.M != 8192),
            f"N{self.N}" * (self.N != 4096), f"{self.adapter}-adapter" * (self.adapter != "f32"),
        )  # fmt: skip
        return " ".join(word for word in words if word)


_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_DEPTH = 4096


def describe(config: Config | None) -> str:
    """``128x256x64-w8-s3-tma``."""
    if config is None:
        return "default"
    sizes = [getattr(config, name, None) for name in ("block_m", "block_n", "block_k")]
    tile = "x".join(str(size) for size in sizes if size)
    return f"{tile}-w{config.warps}-s{config.stages}" + "-tma" * getattr(
        config, "descriptors", False
    )


def launches(case: Case) -> list[Launch]:
    """What the call would launch, its tensors being meta tensors."""
    records: list[Launch] = []
    with use_target(TARGETS[case.target]), intercept(records.append):
        _run(case)
    return records


def _run(case: Case) -> None:
    dtype, adapter = _DTYPES[case.dtype], _DTYPES[case.adapter]
    M, N, r, n = case.M, case.N, case.r, case.n

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def each(*shape: int, dtype: torch.dtype = dtype) -> list[Tensor]:
        return [empty(*shape, dtype=dtype) for _ in range(n)]

    shared = {
        "precision": case.precision,
        "config": case.config,
        "dropout": 0.1 if case.masked else 0.0,
        "seeds": empty(n, dtype=torch.int64) if case.masked else None,
    }
    if case.form == "h":
        project(empty(M, N), [a.T for a in each(r, N, dtype=adapter)], [1.0] * n, **shared)
    elif case.form == "dh":
        project(empty(M, N), each(N, r, dtype=adapter), [1.0] * n, **shared)
    elif case.form == "dA":
        out = [gradient.T for gradient in each(r, N, dtype=adapter)]
        weight_grad(empty(M, N), each(M, r), out, **shared)
    elif case.kernel == "weight_grad":
        b = empty(N, r, dtype=adapter) if case.form == "dB,dh" else None
        weight_grad(empty(M, N), each(M, r), each(N, r, dtype=adapter), b=b, **shared)
    else:
        add, makes_h = case.form.endswith("+"), case.form == "y,h"
        forward = case.form.startswith("y")
        ps, qs = each(M, _DEPTH), each(N, _DEPTH) if forward else each(_DEPTH, N)
        vs = each(N, r, dtype=adapter) if forward else each(r, N, dtype=adapter)
        if forward:
            qs, vs = [q.T for q in qs], [v.T for v in vs]
        gemm_lowrank(
            empty(M, N), [] if add else ps, [] if add else qs, each(M, r), vs,
            bias=empty(N) if case.bias else None, add=add,
            a=empty(r, _DEPTH, dtype=adapter).T if makes_h else None, **shared,
        )  # fmt: skip


# Every row of a table is compiled in the first list's forms, the first two in the second's too.
_FORMS: dict[str, tuple[list[dict], list[dict]]] = {
    "gemm_lowrank": (
        [
            {"form": "y", "bias": True},
            {"form": "dx", "masked": True},
            {"form": "y,h", "M": 16},
        ],
        [
            {"form": "y", "r": 64},
            {"form": "y", "r": 200},
            {"form": "dx", "n": 3},
            {"form": "dx", "n": 2, "r": 64},
            {"form": "dx", "n": 2, "masked": True},
            {"form": "dx", "n": 3, "masked": True},
            {"form": "dx", "r": 128, "masked": True},
        ],
    ),
    "add": (
        [{"form": "y+"}, {"form": "dx+", "masked": True, "n": 3}],
        [
            {"form": "y+", "r": 64, "adapter": "bf16"},
            {"form": "y+", "r": 200},
            {"form": "y+", "dtype": "f32", "precision": "tf32"},
            {"form": "dx+", "dtype": "f32", "precision": "ieee", "n": 2, "masked": True},
            {"form": "dx+", "r": 64, "masked": True, "n": 2},
        ],
    ),
    "project": (
        [{"form": "h", "masked": True}, {"form": "dh"}],
        [
            {"form": "h", "M": 256},
            {"form": "h", "n": 3, "r": 64, "masked": True},
            {"form": "h", "n": 2, "r": 200},
            {"form": "h", "r": 128, "masked": True},
            {"form": "dh", "r": 64, "dtype": "f16"},
        ],
    ),
    "weight_grad": (
        [{"form": "dA", "masked": True}, {"form": "dB"}, {"form": "dB,dh"}],
        [
            {"form": "dA", "N": 2**18},
            {"form": "dA", "n": 3, "masked": True},
            {"form": "dA", "n": 2, "r": 64},
            {"form": "dB", "r": 200, "dtype": "f16"},
            {"form": "dB,dh", "r": 64},
        ],
    ),
}
# What a user's call launches: whatever the tables choose.
_CHOSEN: list[dict] = [
    {"form": "y", "r": 8, "M": 1},
    {"form": "y", "M": 300, "N": 1000, "bias": True},
    {"form": "y", "dtype": "f16"},
    {"form": "dx", "n": 4, "r": 64, "masked": True},
    {"form": "dx", "n": 3, "r": 200, "masked": True},
    {"form": "y+", "r": 8},
    {"form": "dx+", "n": 4, "r": 64, "masked": True},
    {"form": "h", "n": 4, "r": 256, "masked": True},
    {"form": "h", "n": 3, "r": 16, "masked": True, "M": 16},
    {"form": "dh", "r": 256},
    {"form": "dA", "n": 4, "r": 256, "masked": True},
    {"form": "dB", "r": 128},
    {"form": "dB,dh", "r": 128},
]
# The accumulators of three masked projections at once are more than the registers of a thread.
SPILLING = Case(
    "sm_90",
    "dx",
    GemmConfig(128, 256, 64, warps=8, stages=3, descriptors=True),
    n=3,
    masked=True,
)


def cases(target: str, quick: bool = False) -> list[Case]:
    """Every row of the target's tables, in each form that it fits; ``quick``: the first forms."""
    found = [] if quick else [Case(target, config=None, **variant) for variant in _CHOSEN]
    for kernel, key, rows in _tables(target):
        common, more = _FORMS["add" if key == "add" else kernel]
        for i, config in enumerate(rows):
            loaders = [config]
            if i == 0 and getattr(config, "descriptors", False):
                loaders.append(replace(config, descriptors=False))
            kind = {"dtype": "f32" if key in (4, "ieee") else "bf16"}
            kind["precision"] = "tf32" if key == 4 else "ieee"
            variants = common + more * (i < 2 and kind["dtype"] == "bf16" and not quick)
            found += [
                Case(target, config=each, **kind | variant)
                for variant in variants
                for each in loaders
            ]
    if not TARGETS[target].tf32:
        found = [replace(case, precision="ieee") for case in found]
    return [case for case in dict.fromkeys(found) if case.fits()]


def _tables(target: str) -> Iterator[tuple[str, str | int, tuple[Config, ...]]]:
    for (name, kernel), table in DEFAULTS.items():
        if name == target:
            tables = table if isinstance(table, dict) else {2: table, 4: table, "ieee": table}
            yield from ((kernel, key, rows) for key, rows in tables.items())
