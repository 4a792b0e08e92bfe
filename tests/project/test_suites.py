"""make suites: its notion of a difference, its choice of tests, and its stand-ins for the hub."""

import json

from suites import compare
from suites.selection import is_about_lora, is_chosen

PASSED = {"outcome": "passed", "seconds": 0.1}
FAILED = {"outcome": "failed", "reason": "AssertionError: no"}


def test_another_outcome_or_a_test_of_one_run_differs(tmp_path):
    def outcomes(**records):
        path = tmp_path / "outcomes.jsonl"
        lines = [json.dumps({"test": f"tests/f.py::{k}"} | v) for k, v in records.items()]
        path.write_text("\n".join(lines))
        return compare.read(path)

    before, after = outcomes(a=PASSED, b=PASSED), outcomes(a=FAILED, b=PASSED | {"calls": {}})
    assert compare.differences(before, before) == []
    (found,) = compare.differences(before, after)
    assert found == compare.Difference("tests/f.py::a", "passed", "failed", FAILED["reason"])
    (lost,) = compare.differences(before, outcomes(b=PASSED))
    assert (lost.unpatched, lost.optimized) == ("passed", compare.NOT_RUN)


OF_LORA = [
    ("test_custom_models.py::TestPeftCustomModel::test_merge[Vanilla-MLP-LoraConfig-0]", True),
    ("test_custom_models.py::TestPeftCustomModel::test_merge[Vanilla-MLP-IA3Config-0]", False),
    ("test_mixed.py::TestMixedAdapterTypes::test_target_first_layer_0_Lora_LoHa", True),
    ("test_mixed.py::TestMixedAdapterTypes::test_target_first_layer_4_LoHa_AdaLora", False),
    ("test_initialization.py::TestLoraInitialization::test_oft_is_not_lora", True),
    ("test_initialization.py::TestVeraInitialization::test_save", False),
]
OF_GPUS = [
    ("test_common_gpu.py::PeftGPUCommonTests::test_4bit_merge_lora", True),
    ("test_common_gpu.py::PeftGPUCommonTests::test_serialization_shared_tensors", False),
    ("test_gpu_examples.py::TestFSDPWrap::test_bnb_4bit_wrap_fsdp", False),
    ("test_other.py::test_scaling", True),
]


def test_lora_s_and_packed_weights_tests_are_picked_and_no_others():
    for rows, picks in ((OF_LORA, is_about_lora), (OF_GPUS, is_chosen)):
        assert [(test, picks(f"tests/{test}")) for test, _ in rows] == rows
