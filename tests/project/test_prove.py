"""tools/prove: proofs of small kernels, and faults that it must find.  ``make prove`` does all."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("z3", reason="z3-solver isn't installed (make .venv/prove)")
pytest.importorskip("triton", reason="the kernels need Triton")

from prove import contracts, faults, modes
from prove.engine import Proof
from prove.source import Edit, Source, run
from prove.values import Int, Operand, Pointer


@pytest.mark.parametrize("kernel", ["gated", "quantize_rows", "project"])
def test_a_kernel_is_proved(kernel):
    assert modes.proof_of(kernel, modes.MODES[kernel][0]).failures == {}


def test_tiles_and_their_numbers_belong_to_each_other_one_to_one():
    assert contracts.prove_tile_of().failures == {}


ROOT = Path(__file__).parents[2]
QUICK = ["gated", "row_loss", "quantize_rows"]


@pytest.mark.parametrize(
    "fault", [each for each in faults.PLANTED if each.subject in QUICK], ids=lambda each: each.name
)
def test_a_planted_fault_is_found_with_numbers(fault):
    assert any(" = " in numbers for numbers in faults.failures_of(fault).values())


def test_an_access_whose_facts_contradict_each_other_fails():

    def setup(proof: Proof) -> tuple[dict, dict]:
        arguments, outputs = modes.facts_of(proof, "gated", {})
        proof.given(arguments["N"].z < 1)
        return arguments, outputs

    proof = run(Proof(), Source(contracts.CONTRACTS), modes.jitted("gated"), setup)
    assert "store out gated_kernel" in " ".join(proof.failures)


def test_a_mask_that_is_dropped_is_found():
    (fault,) = [f for f in faults.all_of(["gated"]) if f.edit == Edit("gated_kernel", mask=0)]
    assert faults.failures_of(fault)


def test_a_stride_is_matched_with_its_axis():
    operand = Operand(4, 8, strides=(Int({("s",): 1}), 1))
    address = (Pointer(operand) + contracts.as_int(3)).address | {("i", "s"): 1}
    rows, columns = operand.indices(address)
    assert (rows.poly, columns.poly) == ({("i",): 1}, {(): 3})


@pytest.mark.parametrize("fault", faults.PLANTED, ids=lambda each: each.name)
def test_a_planted_fault_is_in_its_source(fault):
    names = [path.stem for path in (ROOT / "kernels").glob("*.py")]
    files = [import_module(f"fastlora.kernels.{name}") for name in names if name != "__init__"]
    (plain,) = {
        vars(file)[fault.edit.function].fn for file in files if fault.edit.function in vars(file)
    }
    assert inspect.getsource(plain).count(fault.edit.old) == 1
