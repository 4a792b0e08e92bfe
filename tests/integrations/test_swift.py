"""ms-swift: the plugin file with its callback, and ``fastlora run``."""

import pytest
from conftest import SAID

OPTIONS = (
    "--model_type llama --template dummy --tuner_type lora --lora_rank 4 --lora_dropout 0 "
    "--target_modules all-linear --max_steps 3 --per_device_train_batch_size 2 --logging_steps 1 "
    "--torch_dtype float32 --use_hf true --report_to none --add_version false --output_dir out "
    "--learning_rate 1e-2"
)


@pytest.mark.parametrize("way", ["plugin", "run"])
def test_layers_are_fast_and_losses_are_ms_swift_s(way, tiny, run, trained, tmp_path):
    data = ("--model", tiny / "model", "--dataset", tiny / "data" / "rows.jsonl")
    command = ("-m", "swift.cli.sft", *data, *OPTIONS.split())
    assert "fastlora: " not in run(*command)
    expected = trained(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "plain")
    if way == "run":
        printed = run("-m", "fastlora", "run", *command)
    else:
        path = run("-m", "fastlora", "path", "swift").strip().splitlines()[-1]
        printed = run(*command, "--external_plugins", path, "--callbacks", "fastlora")
    assert printed.count(SAID) == 1
    losses = trained(tmp_path / "out")
    assert len(losses) == 3
    assert losses == pytest.approx(expected, rel=1e-4)
