"""``MergedSampling`` with vLLM: PEFT's merges in training, after which the original bits return.

tests/test_vllm.py has TRL's own synchronization.
"""

import copy
import pickle
import types
from typing import Any

import peft
import pytest
import torch
import transformers
from models import assert_untouched, randomize, refused, snapshot, tiny_llama
from torch import Tensor, nn
from trainer_runs import ADAPTER, SIZES, STEPS, base_model, frozen_bits, trainer_for
from transformers import Trainer

import fastlora
from fastlora.trainer import MergedSampling

# As the arguments of TRL's trainers.
VLLM = types.SimpleNamespace(use_vllm=True)


def begin_with_vllm(model: nn.Module, **settings: Any) -> MergedSampling:
    sampling = MergedSampling(**settings)
    sampling.on_train_begin(VLLM, None, None, model=model)
    return sampling


def both(*names: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Two equal PEFT models in bfloat16; PEFT's adapters are in float32."""
    config = peft.LoraConfig(**ADAPTER | {"init_lora_weights": False} | settings)
    model = peft.get_peft_model(base_model().bfloat16(), config)
    for name in names:
        model.add_adapter(name, config)
    return model, copy.deepcopy(model)


def merged_weights(model: nn.Module, *args: Any, **named: Any) -> dict[str, Tensor]:
    model.merge_adapter(*args, **named)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_merged(model: nn.Module) -> bool:
    return any(getattr(module, "merged", False) for module in model.modules())


def are_peft_s(model: nn.Module) -> bool:
    names = ("merge_adapter", "unmerge_adapter")
    kind = type(model.base_model)
    methods = [getattr(getattr(model, name), "__func__", None) for name in names]
    return methods == [getattr(kind, name) for name in names]


class Synchronize(transformers.TrainerCallback):
    """Merges and unmerges after each step, or only merges, and raises an error, in the last one."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.sent = fails, []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.sent.append(merged_weights(model))
        if self.fails and state.global_step == STEPS:
            raise KeyError
        model.unmerge_adapter()


def test_merges_in_training_leave_the_bits_also_after_an_error(tmp_path):
    model, _ = both()
    fastlora.optimize(model)
    sync = Synchronize()
    trainer = trainer_for(model, tmp_path, Trainer, gradient_checkpointing=True)
    trainer.args.use_vllm = True
    sampling = MergedSampling()
    for callback in (sampling, sync):
        trainer.add_callback(callback)
    before = frozen_bits(model)
    trainer.train()
    assert are_peft_s(model)
    assert all(map(torch.equal, frozen_bits(model), before))
    for place in (sampling.put_back, trainer.train):
        sync.fails = True
        with pytest.raises(KeyError):
            trainer.train()
        assert is_merged(model)
        sync.fails = False
        place()
        assert are_peft_s(model)
        assert not is_merged(model)
        assert all(map(torch.equal, frozen_bits(model), before))
    assert len(sync.sent) == 4 * STEPS
    first, last = (sync.sent[i]["base_model.model.lm_head.weight"] for i in (0, -1))
    assert torch.equal(first, last)
    weight = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert not torch.equal(sync.sent[0][weight], sync.sent[-1][weight])


CALLS = {
    "nothing": ((), {}),
    "names": ((["other"],), {}),
    "both names": ((), {"adapter_names": ["other", "default"]}),
    "unknown": ((["third"],), {}),
    "safe": ((), {"safe_merge": True}),
    "names and safe": ((["other"], True), {}),
}


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_the_arguments_of_merge_adapter_are_peft_s(call, disabled):
    model, theirs = both("other")
    args, named = CALLS[call]
    begin_with_vllm(model)
    if disabled:
        for each in (model, theirs):
            each.disable_adapter_layers()
    before = frozen_bits(model)
    found, expected = (merged_weights(each, *args, **named) for each in (model, theirs))
    assert [*found] == [*expected]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    model.unmerge_adapter()
    assert all(map(torch.equal, frozen_bits(model), before))


def test_a_layer_without_the_adapter_keeps_its_own_weight(monkeypatch):
    model, _ = both()
    sent = []
    monkeypatch.setattr("fastlora.layers.merging.send_to_cpu", lambda p, undo: sent.append(p))
    begin_with_vllm(model, keep="cpu")
    assert len(sent) == 4  # in the try before the first step
    before = snapshot(model)
    model.merge_adapter(["third"])
    assert_untouched(model, before)
    assert len(sent) == 4


def test_arguments_that_peft_refuses_are_refused_and_change_nothing():
    model, _ = both()
    begin_with_vllm(model)
    with refused(model, "should be a list of strings", TypeError):
        model.merge_adapter("default")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    merged_weights(model)  # as PEFT's
    model.unmerge_adapter()
    before = frozen_bits(model)
    with pytest.raises(ValueError, match="q_proj can't be merged: NaN"):
        model.merge_adapter(safe_merge=True)
    assert not is_merged(model)
    assert all(map(torch.equal, frozen_bits(model), before))


def test_a_second_merge_has_the_adapters_of_then():
    model, theirs = both()
    before = frozen_bits(model)
    begin_with_vllm(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged already: call unmerge_adapter\(\) first"):
        model.merge_adapter(["default"])
    for each in (model, theirs):
        torch.manual_seed(1)
        randomize(each)
    found, expected = map(merged_weights, (model, theirs))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    model.unmerge_adapter()
    assert all(map(torch.equal, frozen_bits(model), before))
    with pytest.warns(UserWarning, match="Already unmerged"):  # PEFT's
        model.unmerge_adapter()


@pytest.mark.parametrize("merged_then", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_in_training_with_vllm_merges_its_own_weights(copied, merged_then):
    model, _ = both()
    before = frozen_bits(model)
    sampling = begin_with_vllm(model)
    if merged_then:
        model.merge_adapter()
    other = copied(model)
    if merged_then:
        other.unmerge_adapter()
        assert is_merged(model)
        model.unmerge_adapter()
    other.merge_adapter()
    assert is_merged(other)
    assert not is_merged(model)
    other.unmerge_adapter()
    assert not is_merged(other)
    sampling.put_back()
    assert all(map(torch.equal, frozen_bits(model), before))


def test_a_second_callback_s_merge_is_undone_by_it():
    model, _ = both()
    before = frozen_bits(model)
    first = begin_with_vllm(model)
    model.merge_adapter()
    second = begin_with_vllm(model)
    assert not is_merged(model)
    model.merge_adapter()
    second.put_back()
    assert not are_peft_s(model)
    first.put_back()
    assert are_peft_s(model)
    assert all(map(torch.equal, frozen_bits(model), before))


@pytest.mark.parametrize("keep", ["corrections", "device", "cpu"])
def test_a_model_that_is_unloaded_while_merged_stays_merged(keep):
    model, theirs = both()
    sampling = begin_with_vllm(model, keep=keep)
    model.merge_adapter()
    found, expected = (each.merge_and_unload() for each in (model, theirs))
    sampling.put_back()
    for weight, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other)


def marked(name: str) -> nn.Module:
    """Simulates a model that FSDP1 or ZeRO-3 has sharded, by the mark on its parameters."""
    model, _ = both()
    for parameter in model.parameters():
        setattr(parameter, name, True)
    return model


def injected() -> nn.Module:
    """PEFT's layers without a PeftModel."""
    return peft.inject_adapter_in_model(peft.LoraConfig(**ADAPTER), base_model())


def tied(**settings: Any) -> nn.Module:
    model = tiny_llama(tie_word_embeddings=True, **SIZES)
    return peft.get_peft_model(model, peft.LoraConfig(**ADAPTER | settings))


def two_tuners() -> nn.Module:
    model, _ = both(trainable_token_indices=[1, 2])
    return model


def merged_by_peft() -> nn.Module:
    model, _ = both()
    model.merge_adapter()
    return model


VOCABULARIES = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
REFUSED = {
    "injected": (injected, "LlamaForCausalLM is not a PeftModel: with vLLM"),
    "fsdp": (lambda: marked("_fsdp_flattened"), "q_proj is sharded over ranks"),
    "zero": (lambda: marked("ds_id"), "q_proj is sharded over ranks"),
    "tied head": (lambda: tied(target_modules=["lm_head"]), "weight of .*lm_head is tied"),
    "tied embedding": (lambda: tied(target_modules=["embed_tokens"]), "embed_tokens is tied"),
    "tied adapters": (lambda: tied(**VOCABULARIES), "is tied to another"),
    "tokens": (two_tuners, "is PEFT's TrainableTokensLayer"),
    "merged": (merged_by_peft, "is merged already"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_can_t_be_sent_to_vllm_is_refused_at_once(name):
    make, message = REFUSED[name]
    model = make()
    with refused(model, message):
        begin_with_vllm(model)
    assert not {"merge_adapter", "generate"} & {*vars(model), *vars(model.base_model)}


def test_without_vllm_the_merges_are_peft_s_and_with_it_generate_is():
    model, _ = both()
    sampling = MergedSampling()
    sampling.on_train_begin(None, None, None, model=model)
    assert are_peft_s(model)
    assert "generate" in vars(model)
    server = types.SimpleNamespace(vllm_server_base_url="http://localhost:8000")
    for arguments in (VLLM, server):
        sampling.on_train_begin(arguments, None, None, model=model)
        assert not are_peft_s(model)
        assert "generate" not in vars(model)
        sampling.put_back()
