"""The calls that the compile report looks at: every default config, in the forms of its use."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.forms import Form, Operands
from fastlora.kernels.config import Config, GemmConfig, why_not
from fastlora.kernels.defaults import DEFAULTS
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.target import TARGETS, use_target

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_DEPTH = 4096


@dataclass(frozen=True)
class Case:
    """One call of a launcher, a ``form`` of benchmarks/forms.py; without a config, the default."""

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
    def call_form(self) -> Form:
        depths = (_DEPTH,) * self.n if self.form in ("y", "y,h", "dx") else ()
        return Form(
            self.form, self.M, self.N, (self.r,) * self.n, depths, _DTYPES[self.dtype],
            _DTYPES[self.adapter], 0.1 if self.masked else 0.0, self.bias, self.precision,
        )  # fmt: skip

    def fits(self) -> bool:
        call = self.call_form.call
        return self.config is None or not why_not(self.config, TARGETS[self.target], call)

    def __str__(self) -> str:
        flags = ("mask" * self.masked, "bias" * self.bias)
        dtype = f"{self.dtype}-{self.precision}" if self.dtype == "f32" else self.dtype
        words = (
            self.target, self.form, describe(self.config), dtype, f"r{self.r}",
            f"n{self.n}" * (self.n > 1), *flags, f"M{self.M}" * (self.M != 8192),
            f"N{self.N}" * (self.N != 4096), f"{self.adapter}-adapter" * (self.adapter != "f32"),
        )  # fmt: skip
        return " ".join(word for word in words if word)


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
        Operands(case.call_form, "meta").run(case.config)
    return records


# Every row of a table is compiled in the first list's forms, the first two in the second's too.
_FORMS: dict[str, tuple[list[dict], list[dict]]] = {
    "gemm_lowrank": (
        [{"form": "y", "bias": True}, {"form": "dx", "masked": True}, {"form": "y,h", "M": 16}],
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
    "sm_90", "dx", GemmConfig(128, 256, 64, warps=8, stages=3, descriptors=True), n=3, masked=True
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
