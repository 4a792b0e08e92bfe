"""The benchmarks: what is wrong gets no time, and another commit is really another commit.

And the table of counted bytes: what fastlora's launches state, and its peers' passes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from process import run_without_interpreter
from torch import nn

import fastlora
from benchmarks import compare, measure, report
from benchmarks.cases import cpu_cases, gpu_cases
from benchmarks.contestants import frozen
from benchmarks.counted_bytes import (
    EXPERT_ROWS,
    EXPERTS,
    FUSED,
    Shape,
    bytes_of_fastlora,
    counted,
)
from benchmarks.lineup import makers_for
from benchmarks.results import describe_machine, results_path, write_results
from fastlora.formats.bitsandbytes import FourBit
from fastlora.formats.format import Quantized
from fastlora.kernels.plan import UNPACKING

ROOT = Path(__file__).parents[2]
CASE = next(case for case in cpu_cases() if case.tiny and case.dropout)
IN_GIT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git repository")


def row_of(case=CASE, **makers) -> dict:
    return measure.measure(case, torch.device("cpu"), rounds=2, makers={"frozen": frozen, **makers})


def row_with(**makers) -> dict:
    return row_of(**makers, **fastlora_alone())


def fastlora_alone() -> dict:
    return {"fastlora": makers_for(CASE)["fastlora"]}


def changed(change):
    """A maker of fastlora's contestant whose layer is changed."""

    def make(case, tensors, dropout):
        contestant = fastlora_alone()["fastlora"](case, tensors, dropout)
        change(contestant.module)
        return contestant

    return make


def twice_as_much(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda layer, inputs, y: 2 * y)


def other_gradients(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda layer, dxs, dys: tuple(2 * dx for dx in dxs))


def raises(layer: nn.Module) -> None:
    raise RuntimeError("out of resource: shared memory")


BEYOND = "from the oracle, beyond"


@pytest.mark.parametrize(
    ("change", "said"),
    [(twice_as_much, BEYOND), (other_gradients, BEYOND), (raises, "out of resource")],
)
def test_a_contestant_that_is_wrong_or_raises_has_no_time(change, said):
    row = row_with(wrong=changed(change))
    assert said in row["failures"]["wrong"]
    assert set(row["errors"]) == {"frozen", "fastlora"}
    assert set(row["seconds"]["both"]) == {"frozen", "fastlora"}
    assert "wrong" in report.text([row])


def test_without_fastlora_nothing_is_timed():
    row = row_of(fastlora=changed(twice_as_much))
    assert "fastlora" in row["failures"]
    assert (row["rounds"], row["seconds"], row["targets"]) == (0, {}, [])


def test_fastlora_may_keep_x_h_and_seeds_only():
    def keeps_more(layer: nn.Module) -> None:
        layer.register_forward_hook(lambda layer, inputs, y: y.exp().log())

    row = row_of(fastlora=changed(keeps_more))
    allowed = CASE.M * CASE.r * CASE.dtype.itemsize + 8
    assert f"but {allowed} are allowed" in row["failures"]["fastlora"]


def test_a_quantized_layer_may_keep_no_dense_weight():
    case = next(case for case in cpu_cases() if case.id.startswith("quick-quantized-torchao"))
    row = row_of(case, fastlora=makers_for(case)["peft"])
    assert "are allowed" in row["failures"]["fastlora"]  # PEFT's layer keeps it


def test_ratios_are_of_pairs():
    """One slow round is one bad pair, and no other."""
    seconds = {"frozen": iter([9.0, 9.0, 1.0, 1.0]), "fastlora": iter([1.5, 1.5, 1.5, 1.5])}
    steps = {name: lambda t=t: {"both": next(t)} for name, t in seconds.items()}
    summary = measure.in_turn(steps, rounds=2)
    assert summary["rounds"] == 2
    low, middle, high = measure.ratios([1.5, 1.5], [9.0, 1.0])
    assert summary["ratios"]["both"]["fastlora/frozen"] == [low, middle, high]
    assert (low, high) == (pytest.approx(0.5, abs=0.05), pytest.approx(1.17, abs=0.05))


def test_a_results_file_is_what_was_measured(tmp_path):
    row = row_with()
    machine = describe_machine(torch.device("cpu"))
    path = results_path(machine, tmp_path)
    write_results(path, machine, ["-k", "quick"], [row])
    assert path == tmp_path / machine["device"] / f"{machine['date']}.json"
    command = [sys.executable, "benchmarks/report.py", str(path), CASE.id]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    median = row["ratios"]["both"]["fastlora/frozen"][1]
    [line] = [line for line in printed.splitlines() if line.split()[:2] == [CASE.id, "both"]]
    assert f" {median:.3f} " in line
    assert machine["cpu"] in printed


def test_the_time_of_the_host_is_taken_without_a_gpu():
    code = (
        "import sys, json; sys.path += ['tests/support']; import cuda_standin\n"
        "cuda_standin.install()\n"
        "from benchmarks import cases, host\n"
        "wanted = ('layer-16', 'mlp-96x5')\n"
        "cases = [c for c in cases.host_cases() if c.dropout and c.id[:8] in wanted]\n"
        "print(json.dumps([host.measure(case, 0.0) for case in cases]))"
    )
    row, of_mlp = json.loads(run_without_interpreter("-c", code).splitlines()[-1])
    tiny, real = {"peft", "frozen", "torch backend"}, {"peft, optimized", "fused", "in place"}
    assert set(row["seconds"]["both"]) == row["kernels"].keys() == tiny | real | {"fastlora"}
    assert row["kernels"]["frozen"] == [2, 0]  # torch's, y and dx; none of Triton's
    for quantity, medians in row["seconds"].items():
        for name, median in medians.items():
            assert 0 < row["tenths"][quantity][name] <= median
    ratios = [target["ratio"] for target in row["targets"]]
    assert ratios == ["fastlora/peft", "peft, optimized/peft"]
    assert of_mlp["kernels"].keys() == {"peft", "frozen", "fastlora"}
    assert of_mlp["kernels"]["fastlora"] == [11, 18]  # it is one block; else torch has 14


def test_every_case_has_an_id_of_its_own():
    for cases in (cpu_cases(), gpu_cases()):
        ids = [case.id for case in cases]
        assert len(ids) == len(set(ids))


@IN_GIT
def test_base_imports_the_other_commit():
    with compare.pair_with("HEAD", "cpu") as pair:
        origins = {name: worker.ask("origins") for name, worker in pair.workers.items()}
        row = pair.measure(CASE, rounds=2)
    other = Path(origins["base"]["fastlora"]).parents[1]
    assert origins["base"]["kernels"] == str(other / "kernels" / "__init__.py")
    assert origins["fastlora"]["fastlora"] == fastlora.__file__
    assert other != ROOT
    assert not other.exists()
    assert row["failures"] == {}
    assert len(row["ratios"]["both"]["fastlora/base"]) == 3
    assert "fastlora" in report.text([row])


@IN_GIT
def test_an_unknown_base_is_an_error():
    with pytest.raises(compare.UnknownRefError, match="'no-such-ref' is no commit of"):
        compare.check_ref("no-such-ref")


@IN_GIT
def test_an_interrupted_comparison_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "quick", "--base", "HEAD"]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not base_in(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert base_in(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert not base_in(tmp_path), printed


def base_in(folder: Path) -> list[Path]:
    return list(folder.glob("fastlora-base-*"))


def test_releases_are_in_order_and_the_last_file_of_a_version_counts():
    from benchmarks.releases import _order

    names = "0.9.0-2026-12-01", "0.9.0-2026-12-02", "0.10.0-2026-11-01"
    paths = [Path(f"cpu/release-{name}.json") for name in names]
    assert sorted(reversed(paths), key=_order) == paths


def test_a_release_s_rows_are_rows_of_the_benchmarks():
    from benchmarks import releases
    from benchmarks.cases import cpu_cases

    assert {*releases.ROWS} <= {case.id for case in cpu_cases()}


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["p0", "p0.1"])
def test_two_launches_forward_three_backward(dropout):
    """Forward: x, W, y and x again.  Backward: dy, dy, W, dx and x.  All else is small."""
    shape = Shape()
    found = bytes_of_fastlora(shape, FUSED, dropout=dropout)
    whole, small = shape.M * shape.K * 2, shape.K * shape.r * 2
    weight, h = shape.N * shape.K * 2, shape.M * shape.r * 2
    seeds = 8 if dropout else 0
    assert found.forward == 3 * whole + weight + 2 * (small + h) + seeds
    # lora_b, h, d lora_b, dh; dh, lora_a; dh, d lora_a
    backward = 4 * whole + weight + 4 * small + 4 * h + 2 * seeds
    assert found.backward - found.partial == backward
    assert 0 < found.partial <= 0.04 * (found.both - found.partial)


@pytest.mark.parametrize("name", [name for name in EXPERT_ROWS if "fastlora" in name])
def test_experts_move_at_most_a_quarter_more_than_frozen_ones(name):
    frozen, ours = (
        counted(EXPERT_ROWS["frozen experts"], EXPERTS),
        counted(EXPERT_ROWS[name], EXPERTS),
    )
    assert ours.both <= 1.25 * frozen.both


@pytest.mark.parametrize(("M", "plan"), [(16, UNPACKING), (64, UNPACKING), (8192, FUSED)])
def test_a_packed_weight_is_read_once_and_made_dense_only_for_many_rows(M, plan):
    """In each direction; what was made dense is then read in the dense weight's place."""
    shape = Shape(M=M)
    count = shape.N * shape.K
    tensors = (
        torch.empty(count // 2, dtype=torch.uint8, device="meta"),
        torch.empty(count // 64, dtype=torch.uint8, device="meta"),
        *(torch.empty(size, device="meta") for size in ((count // 2**14,), (256,), ())),
    )
    packed = Quantized(FourBit(shape.N, shape.K, "nf4", 64, 256), tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    found, dense = (
        bytes_of_fastlora(shape, p, packed=w) for p, w in ((plan, packed), (FUSED, None))
    )
    weight = 2 * count
    more = size - weight if plan is UNPACKING else size + weight
    assert found.forward - dense.forward == more
    assert found.backward - dense.backward == more
