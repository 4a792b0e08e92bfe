"""Reports and files under FSDP, which has a part of each parameter between calls."""

import fsdp_worker as worker
import pytest
from peft_worker import LAYERS
from safetensors.torch import load_file

import fastlora


@pytest.mark.parametrize("kind", ["lora", "two-adapters"])
def test_between_calls_the_report_says_that_calls_decide(two, kind):
    for first, after in two.run(worker.reports, kind):
        assert str(after) == str(first)
        text = str(first)
        assert text.startswith(f"0 of {LAYERS} layers fast, {LAYERS} sharded\n{LAYERS} sharded: ")
        assert "more: decided in the call\n0 of 2 gated MLPs as one block\n2 sharded: " in text
        assert first.notes == first.eager == ()
        assert first.layers[0].name == "base_model.model.model.layers.0.self_attn.q_proj"


def test_peft_s_policy_is_named_with_the_setting_that_avoids_it(two):
    for text in two.run(worker.report_by_peft_s_policy):
        assert text.startswith(f"0 of {LAYERS} layers fast, {LAYERS} sharded")
        assert "FSDP wraps lora_A and lora_B by themselves: PEFT's fsdp_auto_wrap_policy" in text
        assert 'FSDP2 (in fsdp_config "version": 2) doesn\'t' in text


@pytest.mark.parametrize("kind", worker.LEFT_OUT)
def test_what_each_rank_trains_for_itself_is_named(two, kind):
    layer = "lm_head" if kind == "fsdp2-head" else "layers.0.self_attn.q_proj"
    for texts in two.run(worker.notes, kind, "left out"):
        for text in texts:
            assert "plain parameters that FSDP, DDP or ZeRO leaves out" in text
            assert "Attach adapters before fully_shard" in text
            assert f"{layer}.lora_A" in text


@pytest.mark.parametrize("kind", worker.TAKEN)
def test_what_is_averaged_or_somebody_s_care_is_not_named(two, kind):
    for texts in two.run(worker.notes, kind, "taken"):
        assert not any("leaves out" in text for text in texts)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("what", worker.OWN)
def test_a_sharded_model_s_adapter_is_saved_whole(two, kind, what, tmp_path):
    for text, names in two.run(worker.saved, str(tmp_path / "sharded"), kind, what):
        assert text.splitlines()[0] == "0 of 2 layers fast, 2 sharded"
        assert names[0] == "model.layers.0.self_attn.q_proj"
    has_embeddings = {"save_embedding_layers": what == "embeddings"}
    fastlora.save_adapter(worker.own_model(what), tmp_path / "alone", **has_embeddings)
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("sharded", "alone")]
    sharded, alone = files
    assert sharded.keys() == alone.keys()
    assert all(sharded[key].equal(alone[key]) for key in alone)
    configs = [(tmp_path / f / "adapter_config.json").read_text() for f in ("sharded", "alone")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("what", ["biases", "modules-to-save", "embeddings"])
def test_a_model_that_fsdp2_shards_loads_what_was_saved(two, what, tmp_path):
    folders, has_embeddings = [tmp_path / "alone", tmp_path / "again"], what == "embeddings"
    fastlora.save_adapter(worker.own_model(what), folders[0], save_embedding_layers=has_embeddings)
    two.run(worker.load_and_save, *map(str, folders), what)
    alone, again = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert again.keys() == alone.keys()
    assert all(again[key].equal(alone[key]) for key in alone)


def test_what_fsdp2_and_ddp_would_leave_out_is_refused(two):
    for merging, *applying in two.run(worker.refusals):
        assert "q_proj is under FSDP, which goes on with the weight that it has" in merging
        assert len(applying) == 2
        for message in applying:
            assert "can't take an adapter: FSDP or DDP has it already" in message


def test_zero3_s_empty_parameters_are_refused(two, tmp_path):
    for message in two.run(worker.save_under_zero3, str(tmp_path)):
        assert "ZeRO-3 has parts of" in message
        assert "deepspeed.zero.GatheredParameters" in message
    assert not list(tmp_path.iterdir())
