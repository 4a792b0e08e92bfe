"""optimize(loss=True): the head's switch, its refusals, and training with lazy logits."""

import copy
import gc
import pickle
import weakref

import peft
import peft_worker
import pytest
import torch
import transformers
from models import Reverse, randomize, refused, tiny_llama
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from trainer_runs import trainer_for, weights

import fastlora
from fastlora.layers.logits import HeadCall, LazyLogits
from fastlora.layers.modules import plain_name

IDS = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
DATA = {"input_ids": IDS, "labels": IDS}
HEADS = {
    "frozen": {"target_modules": ["q_proj"]},
    "adapted": {"target_modules": ["q_proj", "lm_head"]},
    "trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def peft_model(kind: str = "frozen", words: int = 100, **settings) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, **HEADS[kind] | settings)
    return randomize(peft.get_peft_model(tiny_llama(vocab_size=words), config)).train()


def is_fused(logits: torch.Tensor) -> bool:
    """Whether these logits are lazy, and nothing has computed them."""
    return isinstance(logits, LazyLogits) and not logits.cell.call.is_computed


def step(model: nn.Module, **data) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The loss, the gradients and the logits of a step."""
    torch.manual_seed(5)
    out = model(**DATA | data)
    out.loss.backward()
    named = [(plain_name(n), p) for n, p in model.named_parameters() if p.grad is not None]
    gradients = {name: p.grad.clone() for name, p in named}
    model.zero_grad()
    return out.loss.detach(), gradients, out.logits


def assert_same_step(model: nn.Module, expected: nn.Module, **data) -> None:
    (loss, gradients, logits), (loss_, gradients_, logits_) = (
        step(model, **data),
        step(expected, **data),
    )
    torch.testing.assert_close(loss, loss_)
    torch.testing.assert_close(gradients, gradients_, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.detach() + 0.0, logits_.detach())


@pytest.mark.parametrize("kind", HEADS)
def test_a_peft_model_s_loss_needs_no_logits(kind):
    model, expected = peft_model(kind), peft_model(kind)
    classes = [type(module) for module in model.modules()]
    assert fastlora.optimize(model, loss=True) is model
    assert "\nloss without logits: base_model.model.lm_head" in str(fastlora.coverage(model))
    assert is_fused(step(model)[2])
    assert_same_step(model, fastlora.optimize(expected))
    assert [type(module) for module in fastlora.restore(model).modules()] == classes
    assert type(model(**DATA).logits) is torch.Tensor


def test_dropout_of_the_head_s_adapter_is_that_of_the_logits():
    """Dense logits and the loss of one call share the mask."""
    model = fastlora.optimize(peft_model("adapted", lora_dropout=0.5), loss=True)
    out = model(**DATA)
    assert is_fused(out.logits)
    rows = out.logits[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(rows.detach() + 0.0, IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss.detach(), expected)


@pytest.mark.parametrize("batch", [{}, {"num_items_in_batch": torch.tensor(40)}])
def test_labels_with_ignored_rows_and_a_divisor(batch):
    labels = IDS.clone()
    labels[0, :5] = -100
    model = fastlora.optimize(peft_model(), loss=True)
    assert_same_step(model, peft_model(), labels=labels, **batch)


# A switched-off adapter leaves the base, which is the reference model of DPO.
def test_without_its_adapter_the_head_is_its_base():
    model, expected = fastlora.optimize(peft_model("adapted"), loss=True), peft_model("adapted")
    with model.disable_adapter(), expected.disable_adapter(), torch.no_grad():
        out = model(**DATA)
        assert is_fused(out.logits)
        torch.testing.assert_close(out.loss, expected(**DATA).loss)
    model.merge_adapter()
    with torch.no_grad():
        out = model(**DATA)
        assert is_fused(out.logits)
        torch.testing.assert_close(out.loss, expected(**DATA).loss)


@pytest.mark.parametrize("labels", [torch.full_like(IDS, -100), IDS[:, :1]])
def test_a_batch_without_targets_gives_zero_gradients(labels):
    """torch's loss is NaN there, and its gradients are zero."""
    data = {"input_ids": IDS[:, : labels.shape[1]], "labels": labels}
    model = fastlora.optimize(peft_model("adapted"), loss=True)
    loss, gradients, _ = step(model, **data)
    assert loss.isnan()
    assert not any(gradient.any() for gradient in gradients.values())


def logits_loss(logits: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, IDS[..., None])


def old_logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        old = model(input_ids=IDS).logits
    return (logprobs(model(input_ids=IDS).logits) - logprobs(old)).exp().mean()


def reversed_logits(model: nn.Module) -> torch.Tensor:
    return logits_loss(Reverse.apply(model(input_ids=IDS).logits))


def checkpointed_head(model: nn.Module) -> torch.Tensor:
    hidden = model.base_model.model.model(IDS).last_hidden_state
    head = model.get_output_embeddings()
    return logits_loss(checkpoint(lambda hidden: head(hidden * 1.0), hidden, use_reentrant=True))


def loss_without_adapters(model: nn.Module) -> torch.Tensor:
    """PEFT freezes the adapters inside of ``disable_adapter()``, after the head's call."""
    logits = model(input_ids=IDS).logits
    with model.disable_adapter():
        return logits_loss(logits)


def logits_without_adapters(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS).logits
    with model.disable_adapter():
        return logits.square().mean()


LOSSES = [
    old_logits, reversed_logits, checkpointed_head,
    loss_without_adapters, logits_without_adapters,
]  # fmt: skip


@pytest.mark.parametrize("loss_of", LOSSES)
def test_gradients_around_lazy_logits(loss_of):
    found = []
    for loss in (True, False):
        model = fastlora.optimize(peft_model("adapted"), loss=loss)
        loss_of(model).backward()
        named = model.named_parameters()
        found.append({name: p.grad for name, p in named if p.grad is not None})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_target_that_changes_before_the_backward_is_an_error():
    logits = fastlora.optimize(peft_model("adapted"), loss=True)(input_ids=IDS).logits
    target = IDS.flatten().clone()
    loss = functional.cross_entropy(logits.flatten(0, 1), target, reduction="none")
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


MERGES = {  # the changes before and after the head's call
    "merge": (lambda model: model, lambda model: model.merge_adapter()),
    "unmerge": (lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
    "unload": (lambda model: model, lambda model: model.merge_and_unload() and gc.collect()),
}


@pytest.mark.parametrize(("before", "after"), MERGES.values(), ids=MERGES)
def test_a_merge_before_the_logits_are_read_is_an_error(before, after):
    model = fastlora.optimize(peft_model("adapted"), loss=True)
    before(model)
    logits = model(input_ids=IDS).logits
    after(model)
    for read in (logits_loss, torch.sum):
        with pytest.raises(RuntimeError, match="have changed since its call"):
            read(logits)


def two_adapters(model: nn.Module) -> None:
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])


def hooked(model: nn.Module) -> None:
    model.get_output_embeddings().register_forward_hook(lambda *_: None)


def patched(model: nn.Module) -> None:
    head = model.get_output_embeddings()
    head.forward = lambda x: type(head).forward(head, x)


CHANGES = {
    "it has several active adapters": two_adapters,
    "its calls have a hook": hooked,
    "its forward was replaced": patched,
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_head_that_can_t_be_lazy_says_why_and_runs_as_before(reason):
    model, expected = fastlora.optimize(peft_model("adapted"), loss=True), peft_model("adapted")
    for each in (model, expected):
        CHANGES[reason](each)
    line = str(fastlora.coverage(model)).splitlines()[-1]
    assert line.startswith("loss with logits: base_model.model.lm_head: ")
    assert reason in line
    with torch.no_grad():
        out = model(**DATA)
        assert not isinstance(out.logits, LazyLogits)
        torch.testing.assert_close(out.loss, expected(**DATA).loss)


def test_a_replaced_head_is_reported():
    model = fastlora.optimize(peft_model(), loss=True)
    model.resize_token_embeddings(110)
    line = str(fastlora.coverage(model)).splitlines()[-1]
    assert line.startswith("loss with logits: base_model.model.lm_head: it replaced the lazy head")
    fastlora.optimize(model, loss=True)
    assert is_fused(model(**DATA).logits)
    assert "loss with" not in str(fastlora.coverage(fastlora.restore(model)))


def test_mobilebert_computes_its_logits_without_its_head():
    config = transformers.MobileBertConfig(
        vocab_size=100, hidden_size=32, embedding_size=16, num_hidden_layers=1,
        intermediate_size=32, num_attention_heads=2, intra_bottleneck_size=16,
    )  # fmt: skip
    model = transformers.MobileBertForMaskedLM(config)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.warns(UserWarning, match="doesn't call the head"):
        fastlora.optimize(model, loss=True)
    assert "loss without" not in str(fastlora.coverage(model))


def test_an_adapter_added_to_a_lazy_head_is_reported():
    model = fastlora.optimize(peft_model(), loss=True)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter("second")
    assert type(model(**DATA).logits) is torch.Tensor
    line = str(fastlora.coverage(model)).splitlines()[-1]
    assert line.startswith(
        "loss with logits: base_model.model.lm_head: its adapter was added later"
    )
    fastlora.optimize(model, loss=True)
    assert is_fused(model(**DATA).logits)
    lines = str(fastlora.coverage(model)).splitlines()
    heads = [line for line in lines if line.startswith("loss with")]
    assert heads == ["loss without logits: base_model.model.lm_head"]


def test_a_dora_head_keeps_its_logits():
    model = fastlora.optimize(peft_model("adapted", use_dora=True), loss=True)
    assert str(fastlora.coverage(model)).endswith("lm_head: it is DoRA")
    assert type(step(model)[2]) is torch.Tensor


def test_a_head_of_another_class_is_left_alone_with_a_warning():
    model = peft_model()
    model.base_model.model.lm_head = nn.Sequential(model.get_output_embeddings())
    with pytest.warns(UserWarning, match=r"loss=True has no effect.*it is a Sequential, no torch"):
        fastlora.optimize(model, loss=True)
    assert type(model.get_output_embeddings()) is nn.Sequential
    model, config = nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"])
    with pytest.warns(UserWarning, match="returns no module"):
        fastlora.get_peft_model(model, config, loss=True)


def test_loss_must_be_a_bool():
    with pytest.raises(ValueError, match="loss"):
        fastlora.optimize(peft_model(), loss="yes")
    with refused(model := tiny_llama(), "loss"):
        fastlora.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), loss=1)


@pytest.mark.parametrize("kind", HEADS)
def test_check_compares_the_lazy_loss_with_peft_s(kind):
    model = fastlora.optimize(peft_model(kind, lora_dropout=0.1), loss=True)
    result = fastlora.check(model, DATA)
    assert result, str(result)
    assert is_fused(step(model)[2])


def test_logits_can_be_read_after_backward_but_not_after_a_step():
    model = fastlora.optimize(peft_model("adapted"), loss=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    expected = peft_model("adapted")(**DATA).logits
    first, second = model(**DATA), model(**DATA)
    first.loss.backward()
    torch.testing.assert_close(first.logits.detach() + 0.0, expected.detach())
    optimizer.step()
    assert first.logits.sum() == first.logits.sum()  # computed before the step
    with pytest.raises(RuntimeError, match="have changed since its call"):
        second.logits.sum()
    with pytest.raises(RuntimeError, match="have changed since its call"):
        logits_loss(second.logits)


# Weights and hidden states that change before the logits are read.


@pytest.mark.parametrize("kind", ["adapted", "trained"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_optimizer_s_step_is_noticed(kind, optimizer):
    """Fused optimizers change parameters without a new version."""
    model = fastlora.optimize(peft_model(kind), loss=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    out = model(**DATA)
    out.loss.backward()
    optimizer(trained, lr=1e-3, fused=True).step()
    with pytest.raises(RuntimeError, match="have changed since its call"):
        out.logits.sum()


def test_hidden_states_that_change_in_inference_mode_leave_the_logits():
    model = fastlora.optimize(peft_model("frozen"), loss=True)
    head = model.get_output_embeddings()
    with torch.inference_mode():
        hidden = torch.randn(2, 3, head.in_features)
        logits, expected = head(hidden), hidden @ head.weight.T
        hidden.zero_()
        torch.testing.assert_close(logits, expected)


def test_a_write_to_the_logits_of_a_checkpointed_loss_is_an_error():
    logits = fastlora.optimize(peft_model("adapted"), loss=True)(input_ids=IDS).logits
    loss = checkpoint(logits_loss, logits, use_reentrant=False)
    with torch.no_grad():
        logits.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_generation_gives_the_same_tokens(autocast):
    model, expected = fastlora.optimize(peft_model("adapted"), loss=True), peft_model("adapted")
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tokens = [each.eval().generate(input_ids=IDS, **settings) for each in (model, expected)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = fastlora.optimize(peft_model("adapted"), loss=True)
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model.gradient_checkpointing_enable(**settings)
    model.enable_input_require_grads()
    assert_same_step(model, peft_model("adapted"))


def test_a_copy_and_a_pickle_stay_lazy():
    model = fastlora.optimize(peft_model("adapted"), loss=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_fused(step(other)[2])
        assert_same_step(other, peft_model("adapted"))
        assert type(fastlora.restore(other).get_output_embeddings()) is peft.tuners.lora.Linear


def test_nothing_keeps_the_hidden_states_after_a_step():
    """No cycle: reference counts free everything, without the garbage collector."""
    model = fastlora.optimize(peft_model("adapted"), loss=True)
    gc.collect()
    gc.disable()
    try:
        out = model(**DATA)
        call = weakref.ref(out.logits.cell.call)
        hidden = weakref.ref(out.logits.cell.call.head.x)
        out.loss.backward()
        del out
        assert call() is None
        assert hidden() is None
        out = model(**DATA)
        call = weakref.ref(out.logits.cell.call)
        out.logits.sum().backward()
        del out
        assert call() is None
    finally:
        gc.enable()


def test_a_compiled_model_computes_the_head_s_logits(fresh_compiler):
    model = fastlora.optimize(peft_model("adapted"), loss=True)
    compiled = torch.compile(model, backend="eager")
    assert_same_step(compiled, peft_model("adapted"))
    assert not isinstance(compiled(**DATA).logits, LazyLogits)


def test_a_compiled_loss_takes_lazy_logits(fresh_compiler):
    def of(logits: torch.Tensor) -> torch.Tensor:
        rows = logits.flatten(0, 1)
        return functional.cross_entropy(rows, IDS.flatten()) + rows.logsumexp(-1).mean()

    logits = fastlora.optimize(peft_model(), loss=True)(**DATA).logits
    expected = of(peft_model()(**DATA).logits)
    torch.testing.assert_close(torch.compile(of, backend="eager")(logits), expected)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
TRAININGS = {
    "accumulation": {"gradient_accumulation_steps": 2} | EVALUATED,
    "autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "loss-only": {"prediction_loss_only": True} | EVALUATED,
}


@pytest.mark.parametrize("how", TRAININGS)
def test_trainer_trains_alike_and_computes_no_logits(how, tmp_path, monkeypatch):
    dense = []
    compute = HeadCall.logits
    monkeypatch.setattr(HeadCall, "logits", lambda call: dense.append(1) or compute(call))
    runs = []
    for loss in (False, True):
        model = fastlora.optimize(peft_model("adapted", words=20), loss=loss)
        trainer = trainer_for(model, tmp_path / str(loss), transformers.Trainer, **TRAININGS[how])
        trainer.train()
        runs.append([weights(model), [e.get("eval_loss") for e in trainer.state.log_history]])
    tolerance = 2e-2 if how == "autocast" else 1e-4
    torch.testing.assert_close(*[run[0] for run in runs], rtol=tolerance, atol=tolerance)
    assert [e and round(e, 2) for e in runs[0][1]] == [e and round(e, 2) for e in runs[1][1]]
    assert not dense


def test_trainer_s_metrics_get_the_predictions(tmp_path):
    found = []
    for loss in (False, True):
        model = fastlora.optimize(peft_model(words=20), loss=loss)
        trainer = trainer_for(model, tmp_path / str(loss), transformers.Trainer)
        trainer.compute_metrics = lambda given: {"sum": float(abs(given.predictions).sum())}
        found.append(trainer.evaluate())
    assert found[0]["eval_sum"] == pytest.approx(found[1]["eval_sum"], rel=1e-6)
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)


WRAPPERS = [("ddp", {"find_unused_parameters": True}), ("ddp", {"static_graph": True})]
WRAPPERS += [("fsdp1", {}), ("fsdp2", {})]


@pytest.mark.parametrize(("kind", "settings"), WRAPPERS, ids=str)
def test_ranks_train_a_lazy_head_as_the_standard_one(two, kind, settings):
    """DDP synchronizes the gradients of a fused loss; a sharded head computes its logits."""
    ours, theirs = (
        two.run(peft_worker.lazy_steps, kind, loss, **settings) for loss in (True, False)
    )
    for (losses, gradients, fused), (losses_, gradients_, _) in zip(ours, theirs, strict=True):
        assert fused == (kind == "ddp")
        assert losses == pytest.approx(losses_, rel=1e-5)
        torch.testing.assert_close(gradients, gradients_, rtol=1e-4, atol=1e-6)
    if kind == "ddp":
        torch.testing.assert_close(ours[0][1], ours[1][1])  # the same on both ranks
