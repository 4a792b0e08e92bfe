"""tools/prove: proofs of small kernels, and faults that it must find.  ``make prove`` does all."""

import pytest

pytest.importorskip("z3", reason="z3-solver isn't installed (make .venv/prove)")
pytest.importorskip("triton", reason="the kernels need Triton")

from prove import contracts, faults, modes
from prove.engine import Proof
from prove.source import Source, run
from prove.values import FailedError, Int, Operand, Pointer


@pytest.mark.parametrize("kernel", ["gated", "quantize_rows", "project"])
def test_a_kernel_is_proved(kernel):
    assert modes.proof_of(kernel, modes.MODES[kernel][0]).failure == ""


def test_tiles_and_their_numbers_belong_to_each_other_one_to_one():
    assert modes.proof_of("tile_of", {}).failure == ""


QUICK = ["gated", "row_loss", "quantize_rows"]


@pytest.mark.parametrize(
    ("words", "old", "new"), [row for row in faults.PLANTED if row[0].split()[0] in QUICK]
)
def test_a_planted_fault_is_found_with_numbers(words, old, new):
    assert " = " in faults.failure_of(faults.planted(words, old, new))


def test_an_access_whose_facts_contradict_each_other_fails():
    proof = Proof()

    def setup() -> tuple[dict, dict]:
        arguments, outputs = modes.facts_of(proof, "gated", {})
        proof.given(arguments["N"].z < 1)
        return arguments, outputs

    with pytest.raises(FailedError, match="load gate gated_kernel"):
        run(proof, Source().function(modes.jitted("gated")), setup)


def test_a_mask_that_is_dropped_is_found():
    assert " = " in faults.failure_of(faults.masks_of("gated")[0])


def test_a_stride_is_matched_with_its_axis():
    operand = Operand(4, 8, strides=(Int({("s",): 1}), 1))
    address = (Pointer(operand) + contracts.as_int(3)).address | {("i", "s"): 1}
    rows, columns = operand.indices(address)
    assert (rows.poly, columns.poly) == ({("i",): 1}, {(): 3})


@pytest.mark.parametrize("row", faults.PLANTED, ids=" ".join)
def test_a_planted_fault_changes_one_text(row):
    faults.planted(*row)
