"""The benchmarks: a wrong contestant gets no time, and --base really measures another commit.

Also the table of counted bytes: the bytes that fastlora's launches state, and other libraries'
passes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlora
from benchmarks import compare, measure, report
from benchmarks.cases import cpu_cases
from benchmarks.contestants import frozen
from benchmarks.counted_bytes import FUSED, Shape, bytes_of_fastlora
from benchmarks.lineup import makers_for
from benchmarks.results import describe_machine, results_path, write_results

ROOT = Path(__file__).parents[2]
CASE = next(case for case in cpu_cases() if case.tiny and case.dropout)
IN_GIT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git repository")


def row_of(case=CASE, **makers) -> dict:
    return measure.measure(case, torch.device("cpu"), rounds=2, makers={"frozen": frozen, **makers})


def row_with(**makers) -> dict:
    return row_of(**makers, **fastlora_alone())


def fastlora_alone() -> dict:
    return {"fastlora": makers_for(CASE)["fastlora"]}


def changed(change):
    """A maker of fastlora's contestant that changes its layer."""

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


def test_a_quantized_layer_may_keep_no_dense_weight():
    case = next(case for case in cpu_cases() if case.id.startswith("quick-quantized-torchao"))
    row = row_of(case, fastlora=makers_for(case)["peft"])
    assert "are allowed" in row["failures"]["fastlora"]  # PEFT's layer saves the dense weight


def test_a_results_file_has_the_measured_numbers(tmp_path):
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


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["p0", "p0.1"])
def test_two_launches_forward_three_backward(dropout):
    """Forward: x, W, y and x again.  Backward: dy, dy, W, dx and x.  Other tensors are small."""
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
