"""transformers, TRL, accelerate, torch.compile and torch.optim train optimised models as PEFT's.

Both sides have the same dropout masks in the adapters (``shared_masks``).  Most is in float64,
where all that isn't rounding shows.
"""

import copy
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from models import Mlp, tiny_llama
from peft_models import BATCH, VOCABULARY, adapted, assert_same, counted_calls, optimized
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastlora
from fastlora.peft.masks import shared_masks

LAYERS = 14  # 7 in each of 2 blocks
STEPS = 6
# In float64, where up to 5e-13 was measured, from 14 seeds.  But transformers computes norms and
# the loss in float32 in any model, and a last bit may tip a rounding there.
ROUNDING = 1e-8


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from more, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the settings of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def llama(**settings) -> peft.PeftModel:
    """All its linear layers are adapted, with dropout, in float64."""
    config = {"target_modules": "all-linear", "lora_dropout": 0.1} | settings
    return adapted(tiny_llama(), **config).double()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What trains, by PEFT's names."""
    named = model.named_parameters()
    return {name.removeprefix("_orig_mod."): p for name, p in named if p.requires_grad}


def gradients(model: nn.Module, autocast: bool = False) -> dict[str, Tensor]:
    """Of the loss in training, from the same random state and with the same masks each time."""
    torch.manual_seed(7)
    model.train()
    with shared_masks(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=BATCH, labels=BATCH).loss
        loss.backward()
    found = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Of all tensors end to end, ‖found - truth‖ / ‖truth‖."""
    assert found.keys() == truth.keys()
    first, second = (torch.cat([t.double().flatten() for t in d.values()]) for d in (found, truth))
    return ((first - second).norm() / second.norm()).item()


REENTRANT, NOT_REENTRANT = {"use_reentrant": True}, {"use_reentrant": False}
# Keeps what attention gives, as TRL's selective checkpointing does.
SELECTIVE = {
    "use_reentrant": False,
    "context_fn": partial(
        create_selective_checkpoint_contexts,
        [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default],
    ),
}
CHECKPOINTING = {
    "reentrant": {"gradient_checkpointing_kwargs": REENTRANT},
    "not-reentrant": {"gradient_checkpointing_kwargs": NOT_REENTRANT},
    "selective": {"gradient_checkpointing_kwargs": SELECTIVE},
}
KINDS = {"lora": {}, "dora": {"use_dora": True}}


# transformers.Trainer.


class OptimizeOnTrainBegin(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        fastlora.optimize(model)


def trainer_for(model: nn.Module, folder: Path, when: str = "never", **settings) -> Trainer:
    """A Trainer of a few steps; ``when`` says when the model is optimised."""
    if when == "before":
        fastlora.optimize(model)
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    rows = [{"input_ids": row, "labels": row} for row in BATCH]
    trainer = Trainer(
        model,
        TrainingArguments(**arguments | settings),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[OptimizeOnTrainBegin()] if when == "on_train_begin" else [],
    )
    if when == "after":
        fastlora.optimize(model)
    return trainer


def run(trainer: Trainer, **settings) -> dict[str, Tensor]:
    """Train: the losses of the log, and the adapter."""
    with shared_masks(trainer.model):
        trainer.train(**settings)
    losses = [e[k] for e in trainer.state.log_history for k in ("loss", "eval_loss") if k in e]
    adapter = {name: p.detach() for name, p in trained(trainer.model).items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | adapter


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("when", ["before", "after", "on_train_begin"])
def test_trainer_whenever_the_model_is_optimised(when, kind, tmp_path):
    theirs = llama(**kind)
    ours = copy.deepcopy(theirs)
    expected = run(trainer_for(theirs, tmp_path))
    with counted_calls() as calls:
        got = run(trainer_for(ours, tmp_path, when))
    assert len(calls) == LAYERS * STEPS
    assert got["losses"].shape == (STEPS,)
    assert got["losses"][-1] < got["losses"][0] - 0.05
    assert_same(got, expected, ROUNDING)


TRAINER_SETTINGS = {  # and how many forwards it makes in a step
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 2),
    "clipped-sgd": ({"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.1}, 1),
    "evaluation": ({"eval_strategy": "steps", "eval_steps": 1}, 2),
    "smoothed-labels": ({"label_smoothing_factor": 0.1}, 1),
    "neftune": ({"neftune_noise_alpha": 5.0}, 1),
    "reentrant": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": REENTRANT},
        2,
    ),
    "not-reentrant": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": NOT_REENTRANT},
        2,
    ),
    "every-block-but-one": (
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"every_n_layers": 2, "use_reentrant": False},
        },
        1.5,
    ),
}


@pytest.mark.parametrize(("settings", "forwards"), TRAINER_SETTINGS.values(), ids=TRAINER_SETTINGS)
def test_trainer_with(settings, forwards, tmp_path):
    theirs = llama()
    ours = optimized(theirs)
    expected = run(trainer_for(theirs, tmp_path, **settings))
    with counted_calls() as calls:
        got = run(trainer_for(ours, tmp_path, **settings))
    assert len(calls) == LAYERS * STEPS * forwards
    assert_same(got, expected, ROUNDING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trainer_in_bf16_is_no_further_from_the_truth(dtype, tmp_path):
    """``bf16=True`` is autocast; the base is float32 or bfloat16, the adapter float32.

    Losses are off by less than an eps, and PEFT's small error may be luck: hence eps / 16 more.
    """
    theirs = adapted(
        tiny_llama(getattr(torch, dtype)), target_modules="all-linear", lora_dropout=0.1
    )
    truth, ours = copy.deepcopy(theirs).double(), copy.deepcopy(theirs)
    expected = run(trainer_for(truth, tmp_path))
    their_run = run(trainer_for(theirs, tmp_path, bf16=True))
    with counted_calls() as calls:
        our_run = run(trainer_for(ours, tmp_path, "on_train_begin", bf16=True))
    assert len(calls) == LAYERS * STEPS
    our_error, their_error = (
        error({"": each["losses"]}, {"": expected["losses"]}) for each in (our_run, their_run)
    )
    assert our_error <= 2 * their_error + torch.finfo(torch.bfloat16).eps / 16


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("when", ["before", "after", "on_train_begin"])
def test_trainer_saves_peft_s_files(when, kind, tmp_path):
    theirs = llama(target_modules=".*_proj", **kind)  # PEFT writes a list in any order
    ours = copy.deepcopy(theirs)
    for name, model, moment in (("theirs", theirs, "never"), ("ours", ours, when)):
        trainer = trainer_for(model, tmp_path / name, moment, max_steps=2)
        run(trainer)
        trainer.save_model()
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} < names
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names
    for name in names - {"adapter_model.safetensors", "training_args.bin"}:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    expected, got = (tensors_of(tmp_path / name) for name in ("theirs", "ours"))
    assert got[0] == expected[0] == {"format": "pt"}
    assert list(got[1]) == list(expected[1])
    assert_same(got, expected, ROUNDING)


def tensors_of(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, in the file's order."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.offset_keys()}


@pytest.mark.parametrize("resumed", ["ours", "theirs"])
def test_trainer_resumes_from_a_checkpoint(resumed, tmp_path):
    """Half of the steps of one side, then the other half: as the other side without a stop."""
    start = llama()
    theirs, first, second = (copy.deepcopy(start) for _ in range(3))
    expected = run(trainer_for(theirs, tmp_path / "whole"))
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whens = ("never", "before") if resumed == "ours" else ("before", "never")
    run(trainer_for(first, tmp_path / "half", whens[0], **saving))
    trainer = trainer_for(second, tmp_path / "half", whens[1])
    with counted_calls() as calls:
        got = run(
            trainer, resume_from_checkpoint=str(tmp_path / "half" / f"checkpoint-{STEPS // 2}")
        )
    assert len(calls) == (LAYERS * STEPS // 2 if resumed == "ours" else 0)
    assert_same(got, expected, ROUNDING)


def test_trainer_loads_the_best_checkpoint_at_the_end(tmp_path):
    theirs = llama()
    ours = copy.deepcopy(theirs)
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that it isn't the last
    }
    expected = run(trainer_for(theirs, tmp_path / "theirs", **settings))
    trainer = trainer_for(ours, tmp_path / "ours", "before", **settings)
    got = run(trainer)
    assert trainer.state.best_global_step == 1
    assert_same(got, expected, ROUNDING)
    assert not fastlora.coverage(ours).eager


def test_trainer_evaluates_and_predicts(tmp_path):
    theirs = llama()
    ours = optimized(theirs)
    settings = {"label_names": ["labels"]}
    trainer = trainer_for(theirs, tmp_path, **settings)
    expected = trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).predictions
    trainer = trainer_for(ours, tmp_path, **settings)
    with counted_calls() as calls:
        got = trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).predictions
    assert len(calls) == 2 * LAYERS
    assert got[0] == pytest.approx(expected[0], rel=ROUNDING)
    assert_same(*(torch.as_tensor(each[1]) for each in (got, expected)), ROUNDING)


# Activation checkpointing.


def saved_bytes(model: nn.Module) -> int:
    """What waits for the backward of the loss in training, but parameters: each storage once."""
    kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=BATCH, labels=BATCH).loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("how", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_blocks_run_fast_twice_and_keep_less(how, kind):
    theirs = llama(**kind)
    ours, plain = optimized(theirs), optimized(theirs)
    for model in (theirs, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(**how)
    expected = gradients(theirs)
    with counted_calls() as calls:
        got = gradients(ours)
    assert len(calls) == 2 * LAYERS
    assert_same(got, expected, ROUNDING)
    assert_same(got, gradients(plain), 0.0)  # the same masks again
    assert saved_bytes(ours) < 0.5 * saved_bytes(plain)
    assert saved_bytes(ours) == saved_bytes(theirs)


# accelerate.


def train_accelerated(model: nn.Module, when: str = "never", **settings) -> dict[str, Tensor]:
    """Losses and adapter; ``when`` says when the model is optimised."""
    AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=5e-3)
    if when == "before":
        fastlora.optimize(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if when == "after":
        fastlora.optimize(model)
    torch.manual_seed(7)
    model.train()
    losses = []
    with shared_masks(model):
        for _ in range(STEPS):
            with accelerator.accumulate(model):
                loss = model(input_ids=BATCH, labels=BATCH).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    adapter = {name: p.detach() for name, p in trained(model).items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | adapter


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_prepares_before_or_after(when, kind):
    theirs = llama(**kind)
    ours = copy.deepcopy(theirs)
    expected = train_accelerated(theirs, gradient_accumulation_steps=2)
    with counted_calls() as calls:
        got = train_accelerated(ours, when, gradient_accumulation_steps=2)
    assert len(calls) == LAYERS * STEPS
    assert_same(got, expected, ROUNDING)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_in_bf16_is_no_further_from_the_truth(when, kind):
    """accelerate replaces the model's forward by one under autocast."""
    theirs = llama(**kind).float()
    truth, ours = copy.deepcopy(theirs).double(), copy.deepcopy(theirs)
    expected = gradients(truth)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    theirs = accelerator.prepare(theirs)
    assert "forward" in theirs.__dict__
    their_error = error(gradients(theirs), expected)
    if when == "before":
        fastlora.optimize(ours)
    ours = accelerator.prepare(ours)
    if when == "after":
        fastlora.optimize(ours)
    with counted_calls() as calls:
        our_error = error(gradients(ours), expected)
    assert len(calls) == LAYERS
    assert our_error <= 2 * their_error
    assert their_error > 1e-4  # it was bf16


def test_accelerate_saves_and_loads_its_state(tmp_path):
    theirs = llama()
    ours = optimized(theirs)
    expected = gradients(ours)
    accelerator = accelerate.Accelerator(cpu=True)
    ours = accelerator.prepare(ours)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for parameter in trained(ours).values():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    assert_same(gradients(ours), expected, 0.0)
    unwrapped = accelerator.unwrap_model(ours, keep_fp32_wrapper=False)
    assert list(accelerator.get_state_dict(ours)) == list(theirs.state_dict())
    assert not fastlora.coverage(unwrapped).eager


def base_layers(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.endswith(".base_layer")]


@pytest.mark.parametrize("first", ["optimized", "hooked"])
@pytest.mark.parametrize(
    ("settings", "fast"),
    [({}, True), ({"io_same_device": True}, False)],
    ids=["inputs", "outputs"],
)
def test_hooks_of_accelerate_on_base_layers(settings, fast, first):
    """One that moves inputs to the layer's device leaves it fast; one that moves outputs can't."""
    theirs = llama()
    ours = optimized(theirs) if first == "optimized" else copy.deepcopy(theirs)
    for layer in base_layers(ours):
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", **settings))
    fastlora.optimize(ours)
    with counted_calls() as calls:
        got = gradients(ours)
    assert len(calls) == LAYERS * fast
    assert_same(got, gradients(theirs), ROUNDING)


def test_once_accelerate_s_hooks_are_gone_layers_are_fast_again():
    ours = optimized(llama())
    for layer in base_layers(ours):
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        remove_hook_from_module(layer)
    assert not fastlora.coverage(ours).eager


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=BATCH).logits


@pytest.mark.parametrize("first", ["optimized", "offloaded"])
def test_offloaded_layers_are_peft_s(first):
    theirs = llama()
    ours = optimized(theirs) if first == "optimized" else copy.deepcopy(theirs)
    accelerate.cpu_offload(ours, "cpu")
    assert len(fastlora.optimize(ours).eager) == LAYERS
    with counted_calls() as calls:
        assert_same(logits(ours), logits(theirs), 0.0)
    assert not calls


def test_an_offloaded_dora_model_fails_as_peft_s():
    theirs = llama(use_dora=True)
    for model in (optimized(theirs), theirs):
        accelerate.cpu_offload(model, "cpu")
        with pytest.raises(NotImplementedError, match="meta tensor"):
            logits(model)


@pytest.mark.parametrize("first", ["optimized", "dispatched"])
def test_of_a_dispatched_model_only_offloaded_layers_are_peft_s(first, tmp_path):
    theirs = llama()
    expected = logits(theirs)
    ours = optimized(theirs) if first == "optimized" else copy.deepcopy(theirs)
    inner = "base_model.model."
    places = {f"{inner}model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"{inner}lm_head": "cpu", f"{inner}model.layers.0": "cpu"}
    places |= {f"{inner}model.layers.1": "disk"}
    accelerate.dispatch_model(ours, places, offload_dir=str(tmp_path))
    report = fastlora.optimize(ours)
    assert all(".layers.0." in layer.name for layer in report.fast)
    assert all(".layers.1." in layer.name for layer in report.eager)
    with counted_calls() as calls:
        assert_same(logits(ours), expected, ROUNDING)
    assert len(calls) == len(report.fast) == LAYERS // 2


@pytest.mark.parametrize("first", ["optimized", "dispatched"])
def test_a_dispatched_model_trains_fast(first):
    theirs = llama()
    ours = optimized(theirs) if first == "optimized" else copy.deepcopy(theirs)
    accelerate.dispatch_model(ours, {"": "cpu"}, force_hooks=True)
    assert not fastlora.optimize(ours).eager
    with counted_calls() as calls:
        got = gradients(ours)
    assert len(calls) == LAYERS
    assert_same(got, gradients(theirs), ROUNDING)


# torch.compile.


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@contextmanager
def counted_ops() -> Iterator[dict[str, int]]:
    """How often fastlora's ops are called inside by compiled code (eager mode doesn't call them).

    While it compiles they are called too.
    """
    ops: dict[str, int] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield ops
    for event in profile.key_averages():
        if event.key.startswith("fastlora::"):
            ops[event.key.removeprefix("fastlora::")] = event.count


def train_compiled(
    model: nn.Module, step: Callable, share: bool
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Losses and adapter of 3 steps, of which only the first may compile; and the last's ops."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(trained(model.train()).values(), lr=5e-3)
    losses = []
    for i in range(3):
        with (
            torch._dynamo.config.patch(error_on_recompile=i > 0),
            shared_masks(model) if share else nullcontext(),
            counted_ops() if i == 2 else nullcontext() as ops,
        ):
            loss = step(input_ids=BATCH, labels=BATCH).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapter = {name: p.detach() for name, p in trained(model).items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | adapter, ops


COMPILED = {
    "lora": {"lora_dropout": 0.0},
    "dropout": {},
    "dora": {"use_dora": True, "lora_dropout": 0.0},
    "dora-dropout": {"use_dora": True},
}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora", "model"),
        ("dropout", "model"),
        ("dora-dropout", "model"),
        ("dropout", "blocks"),
        ("dora", "blocks"),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_trains_as_peft_s_in_eager_mode(name, what):
    """Without a graph break, and compiled once; the backend draws as eager mode does.

    DoRA drops with PEFT's own layer, and with its masks.
    """
    settings = COMPILED[name]
    theirs = llama(**settings)
    ours = optimized(theirs)
    expected, _ = train_compiled(theirs, theirs, share=name == "dropout")
    options = {"backend": "aot_eager", "fullgraph": True}
    if what == "model":
        got, ops = train_compiled(ours, torch.compile(ours, **options), share=False)
    else:
        for block in ours.base_model.model.model.layers:
            block.compile(**options)
        got, ops = train_compiled(ours, ours, share=False)
    assert_same(got, expected, ROUNDING)
    assert ops.pop("lora_linears") == ops.pop("lora_linears_backward") == LAYERS
    assert ops == ({"dora_norm": LAYERS} if settings.get("use_dora") else {})


@pytest.mark.usefixtures("fresh_compiler")
def test_optimized_after_compiling_is_compiled_again():
    theirs = llama(lora_dropout=0.0)
    ours = copy.deepcopy(theirs)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    expected = gradients(theirs)
    for change, fast in ((lambda _: None, 0), (fastlora.optimize, 1), (fastlora.restore, 0)):
        change(compiled)
        assert_same(gradients(compiled), expected, ROUNDING)
        with counted_ops() as ops:
            gradients(compiled)
        assert ops.get("lora_linears", 0) == LAYERS * fast


@pytest.mark.usefixtures("fresh_compiler")
def test_check_of_a_compiled_model_that_drops():
    compiled = torch.compile(llama().train(), backend="aot_eager", fullgraph=True)
    assert fastlora.check(compiled, {"input_ids": BATCH, "labels": BATCH})


@pytest.mark.usefixtures("fresh_compiler")
def test_checkpointed_blocks_of_a_compiled_model():
    """They recompute what runs fast, with the same masks."""
    theirs = llama()
    theirs.config.use_cache = False  # or transformers warns, which breaks the graph
    ours = optimized(theirs)
    ours.activation_checkpointing_enable()
    ours.disable_input_require_grads()  # which would break the graph too
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(gradients(compiled), gradients(theirs), ROUNDING)
    with counted_ops() as ops:
        gradients(compiled)
    assert LAYERS < ops["lora_linears"] <= 2 * LAYERS
    assert ops["lora_linears_backward"] == LAYERS


@pytest.mark.usefixtures("fresh_compiler")
def test_a_block_compiled_by_inductor():
    theirs = llama(lora_dropout=0.0)
    ours = optimized(theirs)
    ours.base_model.model.model.layers[0].compile(backend="inductor", fullgraph=True)
    # The float32 norms' sums are in another order.
    assert_same(gradients(ours), gradients(theirs), 1e-5)
    with counted_ops() as ops:
        gradients(ours)
    assert ops == {"lora_linears": LAYERS // 2, "lora_linears_backward": LAYERS // 2}


@pytest.mark.usefixtures("fresh_compiler")
def test_trainer_that_compiles(tmp_path):
    """The Trainer has compiled the model when it is optimised, but it hasn't called it."""
    theirs = llama()
    ours = copy.deepcopy(theirs)
    expected = run(trainer_for(theirs, tmp_path, max_steps=2))
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    with counted_ops() as ops:
        got = run(trainer_for(ours, tmp_path, "on_train_begin", max_steps=2, **compiling))
    assert ops["lora_linears"] >= LAYERS * 2
    assert_same(got, expected, ROUNDING)


# torch.optim, and copies.


def adamw(parameters, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-3, **settings)


OPTIMIZERS = {
    "for-loop": partial(adamw, foreach=False),
    "foreach": partial(adamw, foreach=True),
    "fused": partial(adamw, fused=True),
    "amsgrad-maximize": partial(adamw, amsgrad=True, maximize=True),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "sgd-nesterov": partial(torch.optim.SGD, lr=0.2, momentum=0.9, nesterov=True),
}
AROUND = {
    "plain": {},
    "accumulated": {"parts": 2},
    "clipped": {"max_norm": 0.1},
    "scaled": {"scale": True},
    "all": {"parts": 2, "max_norm": 0.1, "scale": True},
}


def train(model: nn.Module, make: Callable, parts: int = 1, max_norm: float = 0, scale=False):
    """A loop as people write it by hand, with a GradScaler that is on or off."""
    torch.manual_seed(7)
    parameters = list(trained(model.train()).values())
    optimizer, scaler = make(parameters), torch.amp.GradScaler("cpu", enabled=scale)
    losses = []
    with shared_masks(model):
        for _ in range(STEPS):
            for part in BATCH.chunk(parts):
                loss = model(input_ids=part, labels=part).loss / parts
                scaler.scale(loss).backward()
                losses.append(loss.detach())
            if max_norm:
                scaler.unscale_(optimizer)
                losses.append(nn.utils.clip_grad_norm_(parameters, max_norm))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return {"losses": torch.stack(losses)} | {n: p.detach() for n, p in trained(model).items()}


@pytest.mark.parametrize(
    ("make", "around"),
    [(make, {}) for make in OPTIMIZERS.values()]
    + [(OPTIMIZERS["fused"], around) for around in AROUND.values() if around],
    ids=[*OPTIMIZERS, *(f"fused-{name}" for name in AROUND if AROUND[name])],
)
def test_optimizers_of_torch(make, around):
    theirs = llama()
    ours, start = optimized(theirs), copy.deepcopy(theirs)
    expected = train(theirs, make, **around)
    with counted_calls() as calls:
        got = train(ours, make, **around)
    assert len(calls) == LAYERS * STEPS * around.get("parts", 1)
    assert_same(got, expected, ROUNDING)
    assert all(not torch.equal(p, got[name]) for name, p in trained(start).items())


def test_an_optimizer_s_step_inside_of_backward():
    """Parameters change while the layers below wait for their backward."""
    theirs = llama()
    ours = optimized(theirs)
    found = []
    for model in (theirs, ours):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in trained(model).values()}

        def step(parameter, optimizers=optimizers):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(step)
        torch.manual_seed(7)
        with shared_masks(model.train()):
            for _ in range(3):
                model(input_ids=BATCH, labels=BATCH).loss.backward()
        found.append({name: p.detach() for name, p in trained(model).items()})
    assert_same(found[1], found[0], ROUNDING)


def test_an_exponential_moving_average():
    """torch's AveragedModel copies the model; the copy runs fast, alone."""
    theirs = llama()
    ours = optimized(theirs)
    found = []
    for model in (theirs, ours):
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        optimizer = adamw(trained(model.train()).values())
        torch.manual_seed(7)
        with shared_masks(model):
            for _ in range(STEPS):
                model(input_ids=BATCH, labels=BATCH).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(model)
        found.append((average, model))
    with counted_calls() as calls:
        expected, got = ([logits(model) for model in models] for models in found)
    assert len(calls) == 2 * LAYERS
    assert_same(got, expected, ROUNDING)
    assert not torch.equal(got[0], got[1])
    fastlora.restore(ours)
    assert not fastlora.coverage(found[1][0]).eager


def test_a_model_is_sent_to_another_process():
    """Which imports fastlora by itself."""
    ours = optimized(adapted(Mlp(), target_modules=["up", "down"]))
    ours.requires_grad_(False)  # outputs with a graph can't be sent back
    x = torch.randn(3, 8)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        report, y = pool.submit(fastlora.coverage, ours), pool.submit(ours, x)
        assert report.result() == fastlora.coverage(ours)
        assert not report.result().eager
        assert_same(y.result(), ours(x), 0.0)


# TRL.


@pytest.fixture
def words():
    """A tokenizer that knows the words w0 to w99."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", eos_token="w1", unk_token="w2"
    )


SFT_SETTINGS = {  # and how many forwards it makes in a step
    "checkpointing": ({}, 2),  # TRL's default
    "plain": ({"gradient_checkpointing": False}, 1),
    "reentrant": ({"gradient_checkpointing_kwargs": REENTRANT}, 2),
    "packing": ({"packing": True, "packing_strategy": "wrapped", "max_length": 24}, 2),
}


@pytest.mark.parametrize(
    ("name", "who_adapts"), [("checkpointing", "peft"), *((name, "trl") for name in SFT_SETTINGS)]
)
def test_sft_trainer(name, who_adapts, words, tmp_path):
    """TRL makes the PeftModel, which is then optimised; or it is given an optimised one."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    settings, forwards = SFT_SETTINGS[name]
    config = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        lora_dropout=0.1,
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    texts = [" ".join(f"w{i}" for i in row) for row in BATCH.tolist()]
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    base, found = tiny_llama(), []
    for optimizing in (False, True):
        model = copy.deepcopy(base)
        torch.manual_seed(3)
        if who_adapts == "peft":
            model = peft.get_peft_model(model, copy.deepcopy(config))
            if optimizing:
                fastlora.optimize(model)
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(**arguments | copy.deepcopy(settings)),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=words,
            peft_config=copy.deepcopy(config) if who_adapts == "trl" else None,
        )
        trainer.model.double()
        if optimizing and who_adapts == "trl":
            fastlora.optimize(trainer.model)
        with counted_calls() as calls:
            found.append(run(trainer))
        assert len(calls) == LAYERS * 4 * forwards * optimizing
    expected, got = found
    assert_same(got, expected, ROUNDING)
