"""4-bit layers under FSDP2, as QLoRA has them: the numbers of one process, in fast calls."""

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")

import qlora_worker as worker

CASES = {
    "bytes": (torch.uint8, None, "block"),
    "float32": (torch.float32, None, "model"),
    "16-bits": (torch.bfloat16, torch.bfloat16, "block"),
    "each-layer": (torch.bfloat16, None, "layers"),
}


@pytest.mark.parametrize("kind", ["own", "optimized"])
@pytest.mark.parametrize(("storage", "cast", "units"), CASES.values(), ids=CASES)
def test_the_numbers_are_those_of_one_process(two, kind, storage, cast, units):
    expected = worker.step(worker.adapted("own" if kind == "own" else "peft")).numbers
    for found in two.run(worker.sharded, kind, storage, units, cast):
        for one, other in zip(found.numbers, expected, strict=True):
            assert (one - other).norm() <= (1e-6 if cast is None else 0.02) * other.norm()
        hooked = units == "layers"  # FSDP2 gathers by hooks, and a block doesn't call its layers
        assert found.blocks == (0 if hooked else 1)
        assert found.report.startswith("0 of 3 layers fast, 3 sharded")


def test_packed_numbers_that_are_cast_are_refused(two):
    for error in two.run(worker.cast_storage):
        assert "stored as torch.bfloat16, were cast to torch.float16" in error
        assert "bnb_4bit_quant_storage" in error
