"""What the compiler makes of every kernel and config, for GPUs that nobody needs to have here.

``FASTLORA_COMPILE_TRITON`` names a folder with another Triton, which then compiles.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import pytest

from fastlora.kernels.defaults import DEFAULTS

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def in_subprocess(*arguments: str) -> str:
    """Python's output: this process may have imported the kernels to interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = environment.get("FASTLORA_COMPILE_TRITON", "")
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=TARGETS)
def rows(request, tmp_path_factory):
    """The report on one target."""
    path = tmp_path_factory.mktemp("compile") / "report.json"
    report = ("-m", "tools.compile_report", "--target", request.param, "--json", str(path))
    in_subprocess(*report)
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def failing(rows, holds) -> list[str]:
    """The kernels for which it doesn't hold."""
    assert rows
    return [f"{row['kernel']} of {row['case']}" for row in rows if not holds(row, row["compiled"])]


def test_a_loop_over_steps_spills_nothing(rows):
    assert not failing(rows, lambda row, code: code["inner_spills"] == 0)


def test_a_thread_spills_at_most_64_bytes(rows):
    assert not failing(rows, lambda row, code: code["stack"] <= 64)


def test_shared_memory_is_within_the_estimate_and_the_limit(rows):
    rows = [row for row in rows if row["kernel"] != "sum_planes"]  # which has no config
    assert not failing(
        rows, lambda row, code: code["shared_memory"] <= row["estimated"] <= row["limit"]
    )


def test_results_are_stored(rows):
    """A kernel that needs too much tensor memory compiles to one that does nothing."""
    assert not failing(rows, lambda row, code: code["stores"] > 0)


def test_products_run_on_tensor_cores(rows):
    """But for exact float32, which NVIDIA's have not."""
    rows = [row for row in rows if row["kernel"] != "sum_planes" and not row["ieee"]]
    assert not failing(rows, lambda row, code: code["tensor_core"] > 0)


def test_descriptors_load_and_store_by_tma(rows):
    described = [row for row in rows if row["descriptors"]]
    assert bool(described) == (rows[0]["target"] in ("sm_90", "sm_100"))
    for row in described:
        assert row["compiled"]["tma_loads"] > 0, row["case"]
        assert row["compiled"]["tma_stores"] > 0, row["case"]


def test_nothing_else_uses_tma(rows):
    rows = [row for row in rows if not row["descriptors"]]
    assert not failing(rows, lambda row, code: code["tma_loads"] + code["tma_stores"] == 0)


def test_a_config_with_descriptors_uses_them_but_for_adding(rows):
    meant = [
        row for row in rows if row["config"].get("descriptors") and not row["form"].endswith("+")
    ]
    assert meant == [row for row in rows if row["descriptors"]]


def test_every_default_config_is_compiled(rows):
    compiled = [(row["kernel"], row["config"]) for row in rows]
    for (target, kernel), table in DEFAULTS.items():
        if target == rows[0]["target"]:
            configs = chain(*table.values()) if isinstance(table, dict) else table
            missing = [each for each in configs if (kernel, asdict(each)) not in compiled]
            assert not missing


def test_every_config_that_is_compiled_is_allowed(rows):
    assert not failing(rows, lambda row, code: row["refused"] == "")


def test_a_config_that_spills_is_seen_and_refused():
    script = (
        "import json\n"
        "from tools.compile_report import __main__ as report, cases\n"
        "from fastlora.kernels import defaults\n"
        "defaults.why_not = lambda *_: ''  # which would keep it from being launched\n"
        "print(json.dumps(report.rows_of(cases.SPILLING)))\n"
    )
    (row,) = json.loads(in_subprocess("-c", script))
    assert row["compiled"]["spills"] > 0
    assert row["compiled"]["stack"] > 64
    assert "registers" in row["refused"]
