"""What the compiler makes of every kernel and config, for GPUs that nobody needs to have here.

Each config in a form or more, and rare forms on two targets each; `make compile-report` has all of
them everywhere.
"""

import json
import os
import re
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import pytest
import triton
from compile_report.machine_code import chained_products
from process import run_without_interpreter

from fastlora.kernels.config import DEFAULTS

OTHER_TRITON = os.environ.get("FASTLORA_COMPILE_TRITON")
_SOURCE = Path(OTHER_TRITON, "triton", "__init__.py") if OTHER_TRITON else Path(triton.__file__)
VERSION = tuple(map(int, re.search(r"__version__ = '(\d+)\.(\d+)", _SOURCE.read_text()).groups()))


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942"])
def rows(request, tmp_path_factory):
    """The report on one target."""
    path = tmp_path_factory.mktemp("compile") / "report.json"
    report = ("-m", "tools.compile_report", "--brief", "--target", request.param, "--json", path)
    run_without_interpreter(*report)
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def every(row) -> bool:
    return True


# What spills more than the claims below have it: instructions in loops, and bytes of a thread.
# Three masks share their columns' hashes, which the compiler keeps.
SPILLS = {
    "sm_90 dA 32x32-w4-s4 bf16 n3 mask": (2, 64),
    "sm_100 dA 32x32-w4-s4 bf16 n3 mask": (1, 64),
    "sm_100 dx default bf16 r200 n3 mask": (0, 264),
}
if VERSION < (3, 7):
    SPILLS["sm_90 dx 128x256x64-w8-s3-tma bf16 mask"] = 0, 72


def spills_no_more(row, code) -> bool:
    return code["inner_spills"] <= SPILLS.get(row["case"], (0, 64))[0]


def stack_is_small(row, code) -> bool:
    return code["stack"] <= SPILLS.get(row["case"], (0, 64))[1]


def all_but_one(row) -> bool:
    """Before 3.9 Triton spills in a loop of this one (at most 64 bytes, see below)."""
    return not (VERSION < (3, 9) and row["case"] == "sm_80 y default f32-tf32 s8")


def has_config(row) -> bool:
    return bool(row["config"]) and row["kernel"] != "sum_planes"


# By name: which kernels it is about, and what holds of them.
CLAIMS = {
    "loops-over-steps-spill-nothing": (all_but_one, spills_no_more),
    "a-thread-spills-at-most-64-bytes": (every, stack_is_small),
    "shared-memory-is-within-estimate-and-limit": (
        has_config,
        lambda row, code: code["shared_memory"] <= row["estimated"] <= row["limit"],
    ),
    # One that needs too much tensor memory compiles to a kernel that does nothing.
    "results-are-stored": (every, lambda row, code: code["stores"] > 0),
    "products-run-on-tensor-cores": (  # but for exact float32, which NVIDIA's have not
        lambda row: has_config(row) and not row["ieee"],
        lambda row, code: code["tensor_core"] > 0,
    ),
    "nothing-but-descriptors-uses-tma": (
        lambda row: not row["descriptors"],
        lambda row, code: code["tma_loads"] + code["tma_stores"] == 0,
    ),
    # Blackwell's tensor cores get them wrong, as Triton 3.6 to 3.8 compile them (triton#10821).
    "no-product-of-a-loop-adds-to-another-of-its-pass": (
        every,
        lambda row, code: code["chained"] == 0,
    ),
    "the-config-is-allowed": (every, lambda row, code: row["refused"] == ""),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_kernel(claim, rows):
    concerns, holds = CLAIMS[claim]
    rows = [row for row in rows if concerns(row)]
    assert rows
    failing = [row for row in rows if not holds(row, row["compiled"])]
    assert not [f"{row['kernel']} of {row['case']}" for row in failing]


def test_descriptors_load_and_store_by_tma(rows):
    described = [row for row in rows if row["descriptors"]]
    assert bool(described) == (rows[0]["target"] in ("sm_90", "sm_100"))
    for row in described:
        assert row["compiled"]["tma_loads"] > 0, row["case"]
        # A segment's last tile ends anywhere.
        assert (row["compiled"]["tma_stores"] > 0) == (row["segments"] == 0), row["case"]


def test_a_config_with_descriptors_uses_them_but_for_adding(rows):
    meant = [
        row for row in rows if row["config"].get("descriptors") and not row["form"].endswith("+")
    ]
    assert meant == [row for row in rows if row["descriptors"]]


def test_experts_have_tiles_of_few_rows_and_of_many(rows):
    """Each form in one of the two, and no loop of any spills (above)."""
    found = {(row["form"], row["config"].get("block_m")) for row in rows if row["segments"]}
    assert {form for form, _ in found} == {"y", "dx", "y+", "dx+", "h", "dA", "dB,dh"}
    assert len({block_m for form, block_m in found if form == "y"}) == 2


def test_gated_kernels_use_no_shared_memory_and_spill_nothing(rows):
    found = [row for row in rows if row["kernel"].startswith("gated")]
    assert len(found) == 14
    for row in found:
        assert row["compiled"]["shared_memory"] == row["compiled"]["spills"] == 0, row["case"]
        assert row["compiled"]["registers"] <= 64, row["case"]


def test_every_default_config_is_compiled(rows):
    compiled = [row["config"] for row in rows]
    for (target, _), table in DEFAULTS.items():
        if target == rows[0]["target"]:
            assert not [each for each in chain(*table.values()) if asdict(each) not in compiled]


def launches_without_compiling(script: str) -> list[str]:
    """What the script prints of each ``launch`` of some calls on sm_90, whose name is first."""
    calls = (
        "from tools.compile_report.cases import _case, launches, other_cases\n"
        "words = ('y bias', 'y,h M16', 'dx n2 mask', 'dx+', 'h M100 mask', 'dA', 'dB,dh')\n"
        "cases = [_case('sm_90', None, w) for w in words] \n"
        "cases += [each for each in other_cases('sm_90') if ' gated ' in each.name]\n"
        "for launch in (each for case in cases for each in launches(case)):\n"
    )
    return run_without_interpreter("-c", calls + "    " + script).splitlines()


def test_a_launch_compares_no_global_value():
    """Triton would, for each that a kernel reads, at every launch: some 5 µs."""
    script = "print(launch.name, bool(launch.kernel.cache_key), launch.kernel.used_global_vals)"
    lines = launches_without_compiling(script)
    assert set(lines) == {
        f"{name} True {{}}"
        for name in (
            "gemm_lowrank",
            "project",
            "weight_grad",
            "sum_planes",
            "gated",
            "gated_backward",
        )
    }


def test_a_profiler_of_tritons_is_told_the_stated_work():
    """As ``launch_metadata``, which Triton calls with the arguments by name."""
    script = (
        "k, work = launch.kernel, launch.work(); "
        "given = k.signature.bind(**launch.arguments).arguments; "
        "told = k.launch_metadata(launch.grid, None, given); "
        "print(told == {'flops': work.flops, 'bytes': work.loaded + work.stored})"
    )
    lines = launches_without_compiling(script)
    assert len(lines) > 7
    assert set(lines) == {"True"}


def test_a_product_that_adds_to_another_of_its_pass_is_seen():
    """In one pass of a loop, and not in two loops after each other."""
    loop = "%a = scf.for %i = %0 to %1 step %2 iter_args(%s = %z) -> (f32) : i32 {{\n{}}} loc(#1)\n"
    one, two = "%p = tt.dot %x, %w, %s : f32 loc(#2)\n", "%q = tt.dot %h, %b, {} : f32\n"
    assert chained_products(loop.format(one + two.format("%p"))) == 1
    assert chained_products(loop.format(one + two.format("%t"))) == 0
    assert chained_products(loop.format(one) + loop.format(two.format("%a"))) == 0


def test_a_config_that_spills_is_seen_and_refused():
    script = (
        "import json\n"
        "from tools.compile_report import __main__ as report, cases\n"
        "from fastlora.kernels import config\n"
        "case, target = cases.SPILLING, report.TARGETS[cases.SPILLING.target]\n"
        "refused = case.config.why_not(target, case.form.call)\n"
        "config._MOST_SUMS = 10**6  # or it would not be launched\n"
        "print(json.dumps([refused, *report.rows_of(case)]))\n"
    )
    refused, row = json.loads(run_without_interpreter("-c", script))
    assert row["compiled"]["spills"] > 0
    assert row["compiled"]["stack"] > 64
    assert "registers" in refused
