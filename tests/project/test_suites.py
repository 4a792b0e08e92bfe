"""make suites: its notion of a difference, its choice of tests, and its stand-ins for the hub."""

import json

import pytest
from suites import compare, run, source
from suites.selection import is_about_lora, is_chosen
from suites.suite import SUITES

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
OF_TRL = [
    ("test_sft_trainer.py::TestSFTTrainer::test_train_peft_model", True),
    ("experimental/test_orpo_trainer.py::TestORPO::test_orpo_trainer_with_lora[standard]", True),
    ("test_activation_offloading.py::TestPeft::test_noop_manager", False),
]
OF_DIFFUSERS = [
    ("lora/test_lora_layers_sd.py::StableDiffusionLoRATests::test_simple_inference", True),
    ("lora/test_lora_layers_sd.py::LoraIntegrationTests::test_kohya", False),
]


def test_lora_s_and_packed_weights_tests_are_picked_and_no_others():
    trl, diffusers = ((SUITES[name].is_chosen) for name in ("trl", "diffusers"))
    picked = ((OF_LORA, is_about_lora), (OF_GPUS, is_chosen), (OF_TRL, trl))
    for rows, picks in (*picked, (OF_DIFFUSERS, diffusers)):
        assert [(test, picks(f"tests/{test}")) for test, _ in rows] == rows


@pytest.fixture
def checkout(tmp_path):
    """TRL's source, as far as the tests need it."""
    for path in ("tests", "trl", "scripts", "docs"):
        (tmp_path / "trl" / path).mkdir(parents=True)
        (tmp_path / "trl" / path / "conftest.py").touch()
    (tmp_path / "trl" / "VERSION").write_text("1.16.0\n")
    (tmp_path / "trl" / "tests" / "test_dpo_trainer.py").touch()
    return tmp_path / "trl"


def test_a_checkout_s_tests_and_package_are_copied(checkout, tmp_path):
    suite, folder = SUITES["trl"], tmp_path / "run"
    assert source.version_of(suite, checkout) == "1.16.0"
    source.prepare(suite, checkout, folder)
    assert sorted(path.parent.name for path in folder.rglob("conftest.py")) == sorted(suite.parts)
    options = run.parse(["trl", str(checkout)])
    assert run.chosen_files(options, suite, folder / "tests") == ["tests/test_dpo_trainer.py"]


def test_a_folder_that_isn_t_the_project_s_is_refused(checkout, capsys):
    with pytest.raises(SystemExit, match="give the path of a checkout of diffusers"):
        source.version_of(SUITES["diffusers"], checkout)
    with pytest.raises(SystemExit):
        run.parse(["diffusers"])
    assert "diffusers needs PATH" in capsys.readouterr().err
