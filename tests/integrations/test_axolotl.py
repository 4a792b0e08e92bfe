"""axolotl: the plugin in its YAML, and ``fastlora run``."""

import pytest
from conftest import SAID

CONFIG = """
base_model: {tiny}/model
adapter: lora
lora_r: 4
lora_alpha: 8
lora_dropout: 0.0
lora_target_linear: true
datasets:
  - path: {tiny}/data/rows.jsonl
    ds_type: json
    type: chat_template
    field_messages: messages
chat_template: chatml
special_tokens: {{pad_token: "<|im_end|>"}}
dataset_prepared_path: prepared
output_dir: out
sequence_len: 64
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 3
save_steps: 3
learning_rate: 0.01
optimizer: adamw_torch
lr_scheduler: constant
logging_steps: 1
bf16: false
tf32: false
seed: 3
"""
PLUGIN = "plugins: [fastlora.integrations.axolotl.FastLoRAPlugin]\n"
OFF = "".join(f"lora_{name}_kernel: false\n" for name in ("mlp", "qkv", "o", "embedding"))


@pytest.mark.parametrize("way", ["plugin", "run"])
def test_layers_are_fast_and_losses_are_axolotl_s(way, tiny, run, trained, tmp_path):
    config = CONFIG.format(tiny=tiny)
    (tmp_path / "plain.yml").write_text(config + OFF)
    command = ("-m", "axolotl.cli.train")
    assert "fastlora: " not in run(*command, "plain.yml")
    expected = trained(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "plain")
    (tmp_path / "plugin.yml").write_text(config + PLUGIN)
    ways = {"run": ("-m", "fastlora", "run", *command, "plain.yml")}
    printed = run(*ways.get(way, (*command, "plugin.yml")))
    assert printed.count(SAID.removeprefix("fastlora: ")) == 1
    losses = trained(tmp_path / "out")
    assert len(losses) == 3
    assert losses == pytest.approx(expected, rel=1e-4)


def test_the_plugin_s_keys_are_checked(tiny, run, tmp_path):
    config = CONFIG.format(tiny=tiny) + PLUGIN + "fastlora_gated_mlps: some\n"
    (tmp_path / "wrong.yml").write_text(config)
    with pytest.raises(AssertionError, match="fastlora_gated_mlps"):
        run("-m", "axolotl.cli.train", "wrong.yml")
