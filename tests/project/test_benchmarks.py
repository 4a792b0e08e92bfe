"""The benchmarks: what is wrong gets no time, and a time is a ratio of pairs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from process import run_without_interpreter
from torch import nn

from benchmarks import measure, report
from benchmarks.cases import cpu_cases, gpu_cases
from benchmarks.contestants import frozen
from benchmarks.lineup import makers_for
from benchmarks.results import describe_machine, results_path, write_results

ROOT = Path(__file__).parents[2]
CASE = next(case for case in cpu_cases() if case.tiny and case.dropout)


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


@pytest.mark.parametrize("change", [twice_as_much, other_gradients])
def test_a_wrong_contestant_has_no_time(change):
    row = row_with(wrong=changed(change))
    assert "from the oracle, beyond" in row["failures"]["wrong"]
    assert set(row["errors"]) == {"frozen", "fastlora"}
    assert set(row["seconds"]["both"]) == {"frozen", "fastlora"}
    assert "wrong" in report.text([row])


def test_one_that_raises_costs_only_itself():
    def raises(layer: nn.Module) -> None:
        raise RuntimeError("out of resource: shared memory")

    row = row_with(raising=changed(raises))
    assert "out of resource" in row["failures"]["raising"]
    assert set(row["seconds"]["both"]) == {"frozen", "fastlora"}


def test_without_fastlora_nothing_is_timed():
    row = row_of(fastlora=changed(twice_as_much))
    assert "fastlora" in row["failures"]
    assert (row["rounds"], row["seconds"]) == (0, {})


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
    [line] = [line for line in printed.splitlines() if f"{CASE.id} | both" in line]
    assert f"| {median:.3f} |" in line
    assert machine["cpu"] in printed


def test_the_time_of_the_host_is_taken_without_a_gpu():
    code = (
        "import sys, json; sys.path += ['tests/support']; import cuda_standin\n"
        "cuda_standin.install()\n"
        "from benchmarks import cases, host\n"
        "(case,) = [c for c in cases.host_cases() if 'layer-16x' in c.id and c.dropout]\n"
        "print(json.dumps(host.measure(case, 0.5)))"
    )
    row = json.loads(run_without_interpreter("-c", code).splitlines()[-1])
    tiny, real = {"peft", "frozen", "torch backend"}, {"peft, optimized", "fused", "in place"}
    assert set(row["seconds"]["both"]) == row["kernels"].keys() == tiny | real | {"fastlora"}
    assert row["kernels"]["frozen"] == [2, 0]  # torch's, y and dx; none of Triton's
    for quantity, medians in row["seconds"].items():
        for name, median in medians.items():
            assert median > 0, (quantity, name)


def test_every_case_has_an_id_of_its_own():
    for cases in (cpu_cases(), gpu_cases()):
        ids = [case.id for case in cases]
        assert len(ids) == len(set(ids))


def test_the_most_important_shape_comes_first():
    first = gpu_cases()[0]
    assert (first.M, first.K, first.outputs, first.r) == (8192, 4096, (4096,), 16)
