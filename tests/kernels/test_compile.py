"""Compiles every kernel and config for named GPUs, and checks the compiled code.  It needs no GPU.

Each config is compiled in one form or more; experts' forms on every other target, rare forms on
every fourth.  Code that a family of GPUs shares is compiled for one GPU of the family in turn.  The
installed Triton compiles one half of these cases, another Triton (FASTLORA_COMPILE_TRITON) the
other half.  With FASTLORA_COMPILE_ALL, each compiles all cases for every GPU.  `make
compile-report` compiles everything everywhere.  sm_86 uses the configs of sm_89, which is a target
here.
"""

import json
import os
import re
from itertools import chain
from pathlib import Path

import pytest
import triton
from compile_report.cases import FAMILIES, HARDWARE, REPORTED, cases, half_of_cases, other_cases
from compile_report.machine_code import (
    Instruction,
    chained_products,
    overwrites,
    products_in_two_clusters,
)
from process import run_without_interpreter

from fastlora.kernels.config import DEFAULTS, default_config

OTHER_TRITON = os.environ.get("FASTLORA_COMPILE_TRITON")
_SOURCE = Path(OTHER_TRITON, "triton", "__init__.py") if OTHER_TRITON else Path(triton.__file__)
VERSION = tuple(map(int, re.search(r"__version__ = '(\d+)\.(\d+)", _SOURCE.read_text()).groups()))


TARGETS = [name for name in REPORTED if name != "sm_86"]
FAMILY = {name: family for family in FAMILIES for name in family}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[dict]:
    """The report for all targets.  Only one process imports the compilers."""
    path = tmp_path_factory.mktemp("compile") / "report.json"
    chosen = ("--half", "1" if OTHER_TRITON else "0")
    if os.environ.get("FASTLORA_COMPILE_ALL"):
        chosen = ("--brief",)
    run_without_interpreter(
        "-m", "tools.compile_report", *chosen, "--target", *TARGETS, "--json", path
    )
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def halves() -> list:
    """The cases of both halves."""
    return [case for half in (0, 1) for case in half_of_cases(TARGETS, half)]


def families_of(rows) -> set[tuple[str, ...]]:
    return {FAMILY[row["target"]] for row in rows}


def every(row) -> bool:
    return True


# Cases that spill more than the claims below allow: instructions in loops, and bytes of a thread.
# Three masks share the hashes of their columns, and the compiler keeps those in registers.
SPILLS = {
    "sm_90 dA 32x32-w4-s4 bf16 n3 mask": (2, 64),
    "sm_100 dA 32x32-w4-s4 bf16 n3 mask": (1, 64),
    "sm_100 dx default bf16 r200 n3 mask": (0, 264),
}
if VERSION < (3, 7):
    SPILLS["sm_90 dx 128x256x64-w8-s3-tma bf16 mask"] = 0, 72
    SPILLS["sm_100 y 128x256x128-w8-s3 bf16 8bit bias"] = 11, 64
    SPILLS["sm_100 h 64x64-w8-s4 f32-ieee n3 mask"] = 107, 312
    SPILLS["sm_120 dB,dh 32x32-w4-s2 bf16"] = 1, 64
if VERSION == (3, 7):
    SPILLS["sm_100 y 128x256x128-w8-s3 bf16 8bit bias"] = 17, 72
    SPILLS["sm_100 h 64x64-w8-s4 f32-ieee n3 mask"] = 116, 344
    SPILLS["sm_100 row_loss (0.1, 30.0, 2.0, 0.01) ['f32', 50257, True]"] = 1, 8
if (3, 7) <= VERSION < (3, 9):
    SPILLS["sm_100 h 16x32-w4-s3 bf16 n3 mask"] = 1, 64
    SPILLS["sm_120 h 16x32-w4-s3 bf16 n3 mask"] = 1, 64
if (3, 8) <= VERSION < (3, 9):
    SPILLS["sm_100 dx+ default bf16 r64 n3 mask"] = 0, 112
    SPILLS["sm_100 dx+ 64x128-w4-s1 bf16 n3 mask"] = 0, 112
    SPILLS["sm_100 dx+ 128x128-w8-s1 bf16 n3 mask"] = 0, 96


def spills_no_more(row, code) -> bool:
    return code["inner_spills"] <= SPILLS.get(row["case"], (0, 64))[0]


def stack_is_small(row, code) -> bool:
    return code["stack"] <= SPILLS.get(row["case"], (0, 64))[1]


def all_but_one(row) -> bool:
    """Before 3.9, Triton spills in a loop of this case (at most 64 bytes, see below)."""
    return not (VERSION < (3, 9) and row["case"].endswith(" y default f32-tf32 s8"))


def has_config(row) -> bool:
    return bool(row["config"]) and row["kernel"] != "sum_planes"


# Values: the rows of the report that a claim is about, and the condition for a row.
CLAIMS = {
    "loops-over-steps-spill-nothing": (all_but_one, spills_no_more),
    "a-thread-spills-at-most-64-bytes": (every, stack_is_small),
    "shared-memory-is-within-estimate-and-limit": (
        has_config,
        lambda row, code: code["shared_memory"] <= row["estimated"] <= row["limit"],
    ),
    # A config that needs too much tensor memory compiles to a kernel that does nothing.
    "results-are-stored": (every, lambda row, code: code["stores"] > 0),
    # except exact float32, which NVIDIA's tensor cores can't compute
    "products-run-on-tensor-cores": (
        lambda row: has_config(row) and not row["ieee"],
        lambda row, code: code["tensor_core"] > 0,
    ),
    "exact-float32-uses-no-tensor-cores": (  # NVIDIA's tensor cores are never exact in float32
        lambda row: row["ieee"] and row["target"] != "gfx942" and "8bit" not in row["case"],
        lambda row, code: code["tensor_core"] == 0,
    ),
    "nothing-but-descriptors-uses-tma": (
        lambda row: not row["descriptors"],
        lambda row, code: code["tma_loads"] + code["tma_stores"] == 0,
    ),
    # On Blackwell, such products are wrong as compiled by Triton 3.6 to 3.8 (triton#10821).
    "no-product-of-a-loop-adds-to-another-of-its-pass": (
        every,
        lambda row, code: code["chained"] == 0,
    ),
    # ptxas before 13.3 overwrites them if Triton keeps wgmma's operands in registers (triton#9433).
    "no-register-that-a-wgmma-reads-is-written": (
        every,
        lambda row, code: code["overwritten"] == 0,
    ),
    # ptxas 12.9 drops the value of a second addition (triton#11581).
    "16-bit-integers-are-not-added-in-pairs": (every, lambda row, code: code["packed_adds"] == 0),
    # The barrier is then placed before the loads have finished (triton#11696).
    "amd-s-loops-are-not-cut-into-two-clusters": (
        every,
        lambda row, code: code["two_clusters"] == 0,
    ),
    "the-config-is-allowed": (every, lambda row, code: row["refused"] == ""),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_kernel(claim, report):
    concerns, holds = CLAIMS[claim]
    rows = [row for row in report if concerns(row)]
    without = {FAMILY["gfx942"]} if claim == "exact-float32-uses-no-tensor-cores" else set()
    assert families_of(rows) == {*FAMILIES} - without
    failing = [row for row in rows if not holds(row, row["compiled"])]
    assert not [f"{row['kernel']} of {row['case']}" for row in failing]


def test_every_target_has_cases_and_every_family_has_all_kernels(report):
    assert {row["target"] for row in report} == {*TARGETS}
    names = [{row["kernel"] for row in report if row["target"] in each} for each in FAMILIES]
    assert len(names[0]) == 12
    # One half of the cases has each kernel for some target, and both halves for each family.
    assert OTHER_TRITON or all(each == names[0] for each in names)


def test_descriptors_load_and_store_by_tma(report):
    described = [row for row in report if row["descriptors"]]
    assert {row["target"] for row in described} == {"sm_90", "sm_100"}
    for row in described:
        assert row["compiled"]["tma_loads"] > 0, row["case"]
        # a segment's last tile may end at any row, so it is stored without TMA
        assert (row["compiled"]["tma_stores"] > 0) == (row["segments"] == 0), row["case"]


def is_turned(row) -> bool:
    """Whether tensor memory would have to transpose tiles, which races (kernels/faults.py)."""
    return row["target"] == "sm_100" and row["form"] == "dx" and "f32-tf32" in row["case"]


def test_a_config_with_descriptors_uses_them_but_for_adding_and_turning(report):
    meant = [
        row
        for row in report
        if row["config"].get("descriptors") and not row["form"].endswith("+") and not is_turned(row)
    ]
    assert meant == [row for row in report if row["descriptors"]]


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_experts_are_compiled_in_every_form_and_with_tiles_of_few_rows_and_of_many(family, halves):
    """For the targets of each family together.  No loop of any form spills (see above)."""
    found = [each for each in halves if each.target in family and each.form]
    of_experts = [each for each in found if each.form.segments]
    assert {each.form.name for each in of_experts} == {"y", "dx", "y+", "dx+", "h", "dA", "dB,dh"}
    assert {each.form.own for each in of_experts} == {False, True}
    tiles = {
        (each.target, default_config("gemm_lowrank", HARDWARE[each.target], each.form.call).block_m)
        for each in of_experts
        if each.form.name == "y"
    }
    assert len(tiles) > len({name for name, _ in tiles})


def test_gated_kernels_use_no_shared_memory_and_spill_nothing(report):
    found = [row for row in report if row["kernel"].startswith("gated")]
    assert families_of(found) == {*FAMILIES}
    for row in found:
        assert row["compiled"]["shared_memory"] == row["compiled"]["spills"] == 0, row["case"]
        assert row["compiled"]["registers"] <= 64, row["case"]


def test_the_kernel_of_a_loss_spills_nothing_but_where_spills_says_so(report):
    found = [row for row in report if row["kernel"] == "row_loss"]
    assert families_of(found) == {*FAMILIES}
    others = [row["compiled"] for row in found if row["case"] not in SPILLS]
    assert not any(code["spills"] or code["stack"] for code in others)
    assert max(row["compiled"]["registers"] for row in found) <= 80


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_every_default_config_is_in_a_half(family, halves):
    """Also every call without form: gated MLPs, packed weights and losses.

    Two exceptions: rows that fit no form because of sm_80's shared memory, and a compiler fault
    (faults.py).
    """
    targets = [name for name in family if name in TARGETS]
    chosen = [case for case in halves if case.target in targets]
    assert sum(case.form is None for case in chosen) == len(other_cases(targets[0]))
    compiled = {
        case.config or default_config(case.form.kernel, HARDWARE[case.target], case.form.call)
        for case in chosen
        if case.form
    }
    fitting = {case.config for name in targets for case in cases(name)}
    names = {HARDWARE[name].name for name in targets}
    for (target, kernel), table in DEFAULTS.items():
        if target in names:
            missing = {*chain(*table.values())} - compiled
            assert not fitting & missing
            assert not missing or kernel in ("packed", "one pass", "project")


ASKED = """
import json
from tools.compile_report import __main__ as report, cases
from fastlora.kernels import config
from fastlora.kernels.project import ProjectConfig
words = ("y bias", "y,h M16", "dx n2 mask", "dx+", "h M100 mask", "dA", "dB,dh", "y 8bit")
asked = [cases._case("sm_90", None, each) for each in words] + cases.other_cases("sm_90")
launched = []
for launch in (each for case in asked for each in cases.launches(case)):
    kernel, work = launch.kernel, launch.work()
    given = kernel.signature.bind(**launch.arguments).arguments
    told = kernel.launch_metadata(launch.grid, None, given)
    stated = {"flops": work.flops, "bytes": work.loaded + work.stored}
    launched.append([launch.name, bool(kernel.cache_key), kernel.used_global_vals, told == stated])
case, target = cases.SPILLING, cases.HARDWARE[cases.SPILLING.target]
refused = case.config.why_not(target, case.form.call)
config._MOST_SUMS = 10**6  # or it would not be launched
reading = cases._case("sm_90", ProjectConfig(64, 64, warps=8, stages=4), "h mask", "f32-tf32")
ProjectConfig.why_not = lambda *_: ""
overwritten = report.rows_of(reading)[0]["compiled"]["overwritten"]
print(json.dumps([launched, refused, report.rows_of(case)[0], overwritten]))
"""


@pytest.fixture(scope="module")
def asked() -> list:
    """Launches on sm_90 that aren't compiled, and a config that spills."""
    return json.loads(run_without_interpreter("-c", ASKED))


def test_a_launch_compares_no_global_value(asked):
    """Triton compares each global that a kernel reads at every launch, which takes about 5 µs."""
    names = {"gemm_lowrank", "gemm_lowrank_few_rows", "gemm_int8_lowrank", "quantize_rows"}
    names |= {"lowrank", "project", "weight_grad", "sum_planes", "gated", "gated_backward"}
    assert {name for name, *_ in asked[0]} == {*names, "dequant", "row_loss"}
    assert all(key and compared == {} for _, key, compared, _ in asked[0])


def test_a_profiler_of_tritons_is_told_the_stated_work(asked):
    """Triton calls ``launch_metadata`` with the arguments by name."""
    assert len(asked[0]) > 7
    assert all(told for *_, told in asked[0])


def test_a_config_that_spills_is_seen_and_refused(asked):
    _, refused, row, _ = asked
    assert row["compiled"]["spills"] > 0
    assert row["compiled"]["stack"] > 64
    assert "registers" in refused


def test_a_product_that_adds_to_another_of_its_pass_is_seen():
    """Two products in one pass of a loop count; products in two consecutive loops don't."""
    loop = "%a = scf.for %i = %0 to %1 step %2 iter_args(%s = %z) -> (f32) : i32 {{\n{}}} loc(#1)\n"
    one, two = "%p = tt.dot %x, %w, %s : f32 loc(#2)\n", "%q = tt.dot %h, %b, {} : f32\n"
    assert chained_products(loop.format(one + two.format("%p"))) == 1
    assert chained_products(loop.format(one + two.format("%t"))) == 0
    assert chained_products(loop.format(one) + loop.format(two.format("%a"))) == 0


def test_a_register_that_is_written_while_a_wgmma_reads_it_is_seen(asked):
    """For masked TF32 x in tiles of 64 rows, before Triton 3.9; `why_not` refuses them."""
    *_, overwritten = asked
    assert (overwritten > 0) == (VERSION < (3, 9))


def code_of(lines: str) -> list[Instruction]:
    found = [line.partition(" ") for line in lines.split(";")]
    return [
        Instruction(16 * i, False, name, f" {rest} ") for i, (name, _, rest) in enumerate(found)
    ]


PRODUCT = "HGMMA.64x8x8.F32.TF32 R24, R52, gdesc[UR20], R24, gsb0"  # reads R52 to R55


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (f"{PRODUCT};LDSM.16.M88.4 R52, [R3]", 1),
        (f"{PRODUCT};IMAD.WIDE R54, R2, R3, R4", 1),
        (f"{PRODUCT};SHFL.BFLY PT, R55, R2, 0x1, 0x1f", 1),
        (f"{PRODUCT};LDS.128 R48, [R3]", 0),
        (f"{PRODUCT};STS.128 [R52], R52", 0),
        (f"{PRODUCT};WARPGROUP.DEPBAR.LE gsb0, 0x0;LDSM.16.M88.4 R52, [R3]", 0),
        (f"{PRODUCT};WARPGROUP.DEPBAR.LE gsb0, 0x1;LDSM.16.M88.4 R52, [R3]", 1),
        (f"{PRODUCT};{PRODUCT.replace('R52', 'R60')};WARPGROUP.DEPBAR.LE gsb0, 0x1;MOV R52, R1", 0),
        (f"MOV R52, R1;{PRODUCT};BRA 0x0", 1),
        (f"MOV R52, R1;{PRODUCT};WARPGROUP.DEPBAR.LE gsb0, 0x0;BRA 0x0", 0),
    ],
    ids=["load", "pair", "predicate", "beside", "store", "waited", "one-runs", "older", "loop",
         "waited-loop"],
)  # fmt: skip
def test_registers_read_by_a_wgmma_are_protected_until_a_wait(lines, count):
    assert overwrites(code_of(lines)) == count


def test_a_product_that_amd_s_compiler_cuts_into_two_clusters_is_seen():
    """From 2^25 on: M · N · K · bits of an operand."""
    line = "%d = tt.dot %a, %b, %c : tensor<{}x{}xf16> * tensor<{}x{}xf16> -> tensor<{}x{}xf32>\n"
    assert products_in_two_clusters(line.format(256, 64, 64, 128, 256, 128)) == 1
    assert products_in_two_clusters(line.format(128, 64, 64, 128, 128, 128)) == 0
