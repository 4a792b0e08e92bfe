"""The calls of the compile report: every default config, in the forms of its use."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.forms import PACKED, Form, Operands, random_packed
from fastlora.kernels.config import DEFAULTS, Config
from fastlora.kernels.dequant import dequant
from fastlora.kernels.gated import ACTIVATIONS, gated, gated_backward
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.row_loss import row_loss
from fastlora.kernels.target import TARGETS, use_target

REPORTED = ("sm_80", "sm_90", "sm_100", "gfx942", "sm_86", "sm_89", "sm_120")
# Targets with similar code: with `mma.sync`; with products that read shared memory; AMD's.
FAMILIES = (("sm_80", "sm_86", "sm_89", "sm_120"), ("sm_90", "sm_100"), ("gfx942",))
HARDWARE = TARGETS | {"sm_89": replace(TARGETS["sm_86"], arch=89)}  # a device that uses this row
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One call on one target: a launcher's form and config (None: the default), or another call."""

    name: str
    target: str
    config: Config | None = None
    form: Form | None = None
    other: Callable[[], None] | None = None  # a call without form and config


def run_gated(activation: str, dtype: str) -> None:
    """The middle of a gated MLP, forward and backward."""
    dy, gate, up, d_gate, d_up = torch.empty(5, 8192, 3072, dtype=_DTYPES[dtype], device="meta")
    gated(gate, up, activation, d_gate)
    gated_backward(dy, gate, up, activation, d_gate, d_up)


def run_dequant(kind: str, columns: int, dtype: str) -> None:
    """Unpack a weight."""
    packed = random_packed(kind, 4096, columns, "meta")
    dequant(packed, torch.empty(packed.shape, dtype=_DTYPES[dtype], device="meta"))


def run_form(form: Form, config: Config | None = None) -> None:
    Operands(form, "meta").run(config)


def run_row_loss(settings: tuple, dtype: str, columns: int, gradient: bool) -> None:
    """The softmax of a loss.  With smoothing, each row has an upstream gradient."""
    z = torch.empty(2048, columns, dtype=_DTYPES[dtype], device="meta")
    losses = upstream = torch.empty(len(z), device="meta")
    target = torch.empty(len(z), dtype=torch.int64, device="meta")
    row_loss(z, target, losses, settings, upstream if settings[0] else None, gradient)


def launches(case: Case) -> list[Launch]:
    """The launches of the call, captured on meta tensors."""
    records: list[Launch] = []
    with use_target(HARDWARE[case.target]), intercept(records.append):
        if case.form:
            run_form(case.form, case.config)
        else:
            case.other()
    return records


# A word for each kind of packed weight.
_KINDS = dict(zip(("nf4", "nf4-nested", "mxfp4", "int8", "float8"), PACKED, strict=True))
# The result of the call, and its unusual properties: rank, projections … (`_case`).
# Every row of a table is compiled in the forms of the first list, the first two rows also in the
# forms of the second.
_FORMS: dict[str, tuple[list[str], list[str]]] = {
    "gemm_lowrank": (
        ["y bias", "dx mask", "y,h M16"],
        ["y r64", "y r200", "dx n3", "dx r64 n2", "dx n2 mask", "dx n3 mask", "dx r128 mask"],
    ),
    "gemm_lowrank of int8": (
        ["y 8bit bias"], ["y 8bit r64", "y 8bit f16 r200"],
    ),
    "gemm_lowrank of rotated int8": (
        ["dx 8bit mask", "dx 8bit"], ["dx 8bit n3", "dx 8bit n3 mask r64", "dx 8bit f16 r200"],
    ),
    "packed": (
        ["y bias M64 nf4-nested"],
        ["dx M64 n3 mask nf4", "dx M64 int8", "y,h M16 float8", "y M64 mxfp4"],
    ),
    "lowrank": (["y+", "dx+ mask"], ["y+ r64 bf16-adapter", "y+ r200", "dx+ r64 n2"]),
    "lowrank of a masked group": (["dx+ n3 mask"], ["dx+ r64 n2 mask", "dx+ n4 mask"]),
    "project": (["h mask", "dh"], ["h M256", "h r64 n3", "h r200 n2", "h r128 mask", "dh f16 r64"]),
    "project of a masked group": (["h n3 mask"], ["h r64 n3 mask", "h r64 n2 mask"]),
    "weight_grad": (
        ["dA mask", "dB"], ["dA M262144", "dA r64 n2", "dB f16 r200"],
    ),
    "weight_grad of a masked group": (["dA n3 mask"], ["dA r64 n4 mask"]),
    "one pass": (["dB,dh"], ["dB,dh r64"]),
    "one pass over x": (["dA,dx+ n3 mask", "dA,dx+"], ["dA,dx+ r64 n3 mask", "dA,dx+ r64 n4"]),
}  # fmt: skip
# Calls with the configs that the tables choose; also with experts, many rows and few.
_CHOSEN = (
    "y r8 M1", "y bias M300 N1000", "y f16", "dx r64 n4 mask", "dx r200 n3 mask", "y+ r8",
    "dx+ r64 n4 mask", "h r256 n4 mask", "h n3 mask M16", "dh r256", "dA r256 n4 mask", "dB r128",
    "dB,dh r128", "dx+ n5 mask", "h r64 n4 mask", "h r64 n3", "dA r64 n3", "dx+ r64 n3",
    "dx+ r64 n3 mask", "dA r64 n3 mask", "y+ r64", "h r64 mask", "h r64 n3 mask", "dA r256",
)  # fmt: skip
_CHOSEN_BY_EXPERTS = (
    "y bias s128 M32768", "y s128 M512", "dx s128 mask M32768", "dx r200 s8", "y f32-tf32 s8",
    "y+ s128", "h s128 mask", "dA s128 mask", "dB,dh s128",
    "y bias s128 M512 nf4", "dx mask s8 M512 float8",
    # Many adapters.
    "h s8 own mask", "y+ s8 own", "dx+ s8 own mask", "dA s8 own mask", "dB,dh s8 own",
)  # fmt: skip


def cases(target: str, brief: bool = False) -> list[Case]:
    """Every row of the target's tables, in each form that it fits.

    ``brief``: every row once, in one of its forms, and the first row of each table in more forms.
    float32's tables give only the rows whose config is in no other table, and the first row on
    every other target.  Every fourth target has rare forms, every other one the forms of experts.
    """
    turn = REPORTED.index(target) if brief and target in REPORTED else 0
    step = 4 if brief else 1
    by_experts = _CHOSEN_BY_EXPERTS[turn % 2 :: 2] if brief else _CHOSEN_BY_EXPERTS
    chosen, known = (*_CHOSEN[turn % step :: step], *by_experts), set()
    found = [_case(target, None, words) for words in chosen]
    for number, (kernel, product, rows) in enumerate(_tables(target)):
        common, more = _FORMS[kernel]
        more = more[(turn + number) % step :: step]
        dtype = {"16-bit": "bf16", "tf32": "f32-tf32", "float32": "f32-ieee"}[product]
        for i, config in enumerate(rows):
            if brief and (kernel, config) in known and (i or (turn + number) % 2):
                continue
            known.add((kernel, config))
            loaders = [config]
            if i == 0 and getattr(config, "descriptors", False):
                loaders.append(replace(config, descriptors=False))
            variants = common + more * (i < (1 if brief else 2) and dtype == "bf16")
            if brief and (i or dtype != "bf16"):
                variants = [common[i % len(common)]]
            found += [_case(target, each, words, dtype) for words in variants for each in loaders]
    hardware, unique = HARDWARE[target], dict.fromkeys(found)
    return [c for c in unique if not (c.config and c.config.why_not(hardware, c.form.call))]


def other_cases(target: str) -> list[Case]:
    """Every activation of a gated MLP; every kind of packed weight; every form of a loss."""
    gates = [(name, "bf16") for name in ACTIVATIONS] + [("silu", "f16"), ("silu", "f32")]
    packed = [(kind, 4096, "bf16") for kind in PACKED]
    packed += [(PACKED[1], 1000, "bf16"), (PACKED[0], 4096, "f32")]  # blocks of scales across rows
    found = [
        Case(f"{target} gated {' '.join(g)}", target, other=partial(run_gated, *g)) for g in gates
    ]
    for kind, columns, dtype in packed:
        name = f"{target} dequant {kind} K{columns} {dtype}"
        found.append(Case(name, target, other=partial(run_dequant, kind, columns, dtype)))
    for form, dtype in itertools.product(("x8", "dy8"), ("bf16", "f16", "f32-tf32", "f32-ieee")):
        if dtype != "f32-tf32" or HARDWARE[target].tf32:
            name = f"{target} {form} {dtype}"
            rounded = _case(target, None, f"{form} {dtype}").form
            found.append(Case(name, target, other=partial(run_form, rounded)))
    plain, all_settings = (0.0, None, 1.0, 0.0), (0.1, 30.0, 2.0, 0.01)
    for settings, *rest in (
        (plain, "bf16", 128256, True), (plain, "f16", 50257, False), (plain, "f32", 49152, True),
        (all_settings, "bf16", 262144, True), (all_settings, "f32", 50257, True),
    ):  # fmt: skip
        name = f"{target} row_loss {settings} {rest}"
        found.append(Case(name, target, other=partial(run_row_loss, settings, *rest)))
    return found


def half_of_cases(targets: Sequence[str], half: int) -> list[Case]:
    """Every second brief case: half 0 or half 1.

    A case of several targets of a family is compiled for one of them, in turn.
    """
    alike: dict[tuple, list[Case]] = {}
    for target in targets:
        family = next(each for each in FAMILIES if target in each)
        for case in cases(target, brief=True) + other_cases(target):
            words = case.name.removeprefix(target)
            alike.setdefault((family, words), []).append(case)
    found = []
    for turn, ((family, _), same) in enumerate(alike.items()):
        # When all targets had their turn, the next cases are of the other half.  Families begin
        # with different halves, so that each half has forms of all kinds.
        if (turn // len(same) + FAMILIES.index(family)) % 2 == half:
            found.append(same[turn % len(same)])
    return found


def _case(target: str, config: Config | None, words: str, dtype: str = "bf16") -> Case:
    """A row's words, as a case: ``dx r64 n2 mask``."""
    name, *rest = words.split()
    number = {word[0]: int(word[1:]) for word in rest if word[1:].isdigit()}
    dtype = next((word for word in rest if word in ("f16", "f32-tf32", "f32-ieee")), dtype)
    kind, _, precision = dtype.partition("-")
    n = number.get("n", 1)
    form = Form(
        name, number.get("M", 8192), number.get("N", 4096), (number.get("r", 16),) * n,
        depths=(4096,) * n if name in ("y", "y,h", "dx") else (), dtype=_DTYPES[kind],
        adapter_dtype=torch.bfloat16 if "bf16-adapter" in rest else torch.float32,
        dropout=0.1 * ("mask" in rest), bias="bias" in rest,
        precision=precision if precision and HARDWARE[target].tf32 else "ieee",
        packed=next((_KINDS[word] for word in rest if word in _KINDS), ""),
        segments=number.get("s", 0), own="own" in rest, int8="8bit" in rest,
    )  # fmt: skip
    others = [word for word in rest if word != dtype]
    return Case(
        " ".join([target, name, str(config or "default"), dtype, *others]), target, config, form
    )


def _tables(target: str) -> Iterator[tuple[str, str, tuple[Config, ...]]]:
    for (name, kernel), table in DEFAULTS.items():
        if name == HARDWARE[target].name:
            yield from ((kernel, product, rows) for product, rows in table.items())


# The accumulators of three masked projections need more registers than a thread has.
_TOO_LARGE = GemmConfig(128, 256, 64, warps=8, stages=3, descriptors=True)
SPILLING = _case("sm_90", _TOO_LARGE, "dx n3 mask")
