"""Sweeps: each trial against a separate training; halving, interruption, files, invalid input."""

import copy
import json
import os
import signal
from itertools import islice

import pytest
import torch
import transformers
from models import around_values
from torch import nn
from transformers.pytorch_utils import Conv1D
from vendor_layers import quantized

import fastlora
from fastlora.peft.targets import find_targets
from fastlora.sweeps.training import causal_loss, counted, feed
from fastlora.sweeps.trial import Options, as_trials
from fastlora.sweeps.trial_layer import new_pair

STEPS, SEED = 6, 5
CONFIGS = [
    {"r": 2, "learning_rate": 1e-2},
    {"r": 5, "lora_alpha": 20, "learning_rate": 3e-3, "use_rslora": True, "name": "large"},
    {"r": 4, "learning_rate": 2e-2, "target_modules": ["q_proj", "down_proj"]},
    {"r": 1, "learning_rate": 1e-3, "rank_pattern": {"v_proj": 3}},
]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def batches(count: int, examples: int = 2, length: int = 7) -> list[dict]:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(0, 40, (count, examples, length), generator=generator)
    return [{"input_ids": tokens, "labels": tokens} for tokens in rows]


DATA, HELD_OUT = batches(5), batches(2, examples=3)


def swept(
    model: nn.Module, folder, configs=CONFIGS, data=DATA, **options
) -> fastlora.sweeps.record.Sweep:
    settings = {"steps": STEPS, "seed": SEED, "progress": False, "eval_data": HELD_OUT} | options
    return fastlora.sweep(model, configs, data, output_dir=folder, **settings)


def alone(
    model: nn.Module, config: dict, joins=(1,) * STEPS, data=DATA, loss=causal_loss
) -> dict[str, torch.Tensor]:
    """Train one adapter by a plain loop; each step has the mean loss of this many batches."""
    (trial,) = as_trials([config])
    targets = find_targets(model, trial.config)
    torch.manual_seed(SEED)
    pairs = {name: new_pair(target, trial) for name, target in targets.items()}
    fastlora.get_peft_model(model, trial.config, gated_mlps=False)
    with torch.no_grad():
        for name, pair in pairs.items():
            layer = model.get_submodule(name)
            for own, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
                own["default"].weight.copy_(value)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(joins))
    stream = feed(data, SEED, loss)
    for count in joins:
        optimizer.zero_grad()
        given = list(islice(stream, count))
        sizes = [counted(batch["labels"], loss) for batch in given]
        for batch, size in zip(given, sizes, strict=True):
            share = loss(model(**batch).logits, batch["labels"]) * size / sum(sizes)
            share.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name.removesuffix(".default.weight"): value for name, value in named.items()}


def saved(folder) -> dict[str, torch.Tensor]:
    """An adapter's tensors under fastlora's names."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".weight"): value
        for name, value in tensors.items()
    }


def assert_alone(folder, expected: dict) -> None:
    torch.testing.assert_close(saved(folder), expected, rtol=1e-3, atol=1e-5)


def assert_each_alone(base: nn.Module, configs: list[dict], folder, found) -> None:
    """Each trial's adapter is the one of its separate training."""
    for config, outcome in zip(configs, found.outcomes, strict=True):
        expected = alone(copy.deepcopy(base), config)
        assert_alone(folder / "adapters" / outcome.trial.name, expected)


def test_each_trial_equals_its_separate_training(base, model, tmp_path):
    found = swept(model, tmp_path)
    assert [outcome.trial.name for outcome in found.outcomes] == [
        "r2-lr0.01", "large", "r4-lr0.02-q_proj,down_proj", "r1-lr0.001-rank_pattern__v_proj___3_",
    ]  # fmt: skip
    for config, outcome in zip(CONFIGS, found.outcomes, strict=True):
        own = copy.deepcopy(base)
        expected = alone(own, config)
        assert_alone(tmp_path / "adapters" / outcome.trial.name, expected)
        with torch.no_grad():
            losses = [own.eval()(**batch).loss.item() for batch in HELD_OUT]
        assert outcome.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert outcome.parameters == sum(p.numel() for p in expected.values())
        assert [step for step, _ in outcome.losses] == [0, 1, 2, 3, 4, 5, 6]
        report = fastlora.resize_adapter(tmp_path / "adapters" / outcome.trial.name)
        assert outcome.effective_rank == report.effective_rank > 1.0
    assert found.best.loss == min(outcome.loss for outcome in found.outcomes)
    best = fastlora.load_adapter(model, tmp_path / "best")
    with torch.no_grad():
        losses = [best(**batch).loss.item() for batch in HELD_OUT]
    assert found.best.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    config = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
    assert config["r"] == found.best.trial.config.r
    lines = str(found).splitlines()
    assert lines[1].startswith(found.best.trial.name)
    assert lines[1].split()[2] == f"{found.best.effective_rank:.1f}"
    assert lines[-1].endswith(f"best: {found.best.trial.name}")


def own_loss(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("loss", [causal_loss, own_loss])
def test_halving_gives_rows_to_the_remaining_trials(base, model, tmp_path, loss):
    """Batches of several lengths run in separate calls."""
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((module.training, len(kwargs["input_ids"]))),
        with_kwargs=True,
    )
    data = [batches(1, 2, length)[0] for length in (7, 4, 9, 5, 6)]
    found = swept(model, tmp_path, data=data, halving=True, eval_steps=STEPS, loss=loss)
    assert {size for training, size in sizes if training} == {2, 4, 8}
    assert sorted(outcome.steps for outcome in found.outcomes) == [2, 2, 4, 6]
    first = {o.trial.name: dict(o.losses)[2] for o in found.outcomes}
    kept = sorted(first, key=first.__getitem__)[:2]
    assert {o.trial.name for o in found.outcomes if o.steps > 2} == set(kept)
    config = CONFIGS[found.outcomes.index(found.best)]
    expected = alone(copy.deepcopy(base), config, (1, 1, 2, 2, 4, 4), data, loss)
    assert_alone(tmp_path / "best", expected)


def test_a_diverging_trial_spoils_no_other(model, tmp_path):
    wild = {"r": 2, "learning_rate": 1e30, "name": "wild"}
    found = swept(model, tmp_path, [wild, *CONFIGS[:1]], max_grad_norm=0.0)
    assert not found.outcomes[0].loss < 100
    assert found.best is found.outcomes[1]
    json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)  # for example NaN
    same = swept(model, tmp_path / "alone", CONFIGS[:1], max_grad_norm=0.0)
    assert same.best.losses[-1] == pytest.approx(found.best.losses[-1], rel=1e-5)


class Drawing(torch.utils.data.Dataset):
    """A data set that draws random numbers for an example, like an augmentation."""

    def __len__(self):
        return 9

    def __getitem__(self, i):
        torch.rand(1)
        return {name: tokens[:1] for name, tokens in batches(i + 1)[0].items()}


def test_interrupted_and_resumed_it_ends_the_same(base, model, tmp_path):
    """With dropout, a shuffling loader that draws numbers, and halving."""
    configs = [config | {"lora_dropout": 0.2} for config in CONFIGS]
    loader = torch.utils.data.DataLoader(Drawing(), batch_size=None, shuffle=True)
    calls = []

    def loss(logits, labels):
        calls.append(1)
        if len(calls) == 27:  # in the third step
            raise KeyboardInterrupt  # a background job of a shell ignores SIGINT
        return causal_loss(logits, labels)

    def run(folder, model=model, **options):
        return swept(
            model, tmp_path / folder, configs, loader, halving=True, eval_steps=4, **options
        )

    with pytest.raises(KeyboardInterrupt):
        run("cut", loss=loss)
    torch.testing.assert_close(model.state_dict(), base.state_dict(), rtol=0, atol=0)
    assert os.listdir(tmp_path / "cut") == ["state.pt"]
    resumed, whole = run("cut", resume=True), run("whole")
    for one, other in zip(resumed.outcomes, whole.outcomes, strict=True):
        assert (one.losses, one.steps) == (other.losses, other.steps)
    torch.testing.assert_close(saved(tmp_path / "cut/best"), saved(tmp_path / "whole/best"))

    again = run("whole", resume=True)  # a sweep that has ended
    assert [o.losses for o in again.outcomes] == [o.losses for o in whole.outcomes]
    with pytest.raises(ValueError, match="with steps 6, not 9"):
        run("whole", resume=True, steps=9)
    other = copy.deepcopy(model)
    other.model.layers = other.model.layers[:1]
    with pytest.raises(ValueError, match="another base model"):
        run("whole", other, resume=True)
    (tmp_path / "whole" / "state.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"state\.pt can't be read"):
        run("whole", resume=True)


def test_a_killed_sweep_leaves_a_whole_state_and_resumes(model, tmp_path, monkeypatch):
    """It is killed during the third write of its state."""
    writes, save = [], torch.save

    def half(state, file):
        writes.append(1)
        if len(writes) == 3:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    def run(folder, **options):
        return swept(model, tmp_path / folder, CONFIGS[:1], eval_steps=1, steps=4, **options)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(torch, "save", half)
        run("cut")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    resumed, whole = run("cut", resume=True), run("whole")
    assert [o.losses for o in resumed.outcomes] == [o.losses for o in whole.outcomes]
    torch.testing.assert_close(saved(tmp_path / "cut/best"), saved(tmp_path / "whole/best"))


def refuse(logits, labels):
    raise RuntimeError("no more")


def test_the_held_out_loss_is_the_mean_of_all_its_labels(model, tmp_path):
    """Independent of the batches; the label of a text's first token is never predicted."""
    held_out = [*batches(1, 3, 5), *batches(1, 1, 9)]
    held_out[0]["labels"] = held_out[0]["labels"].clone()
    held_out[0]["labels"][1:, :4] = -100
    empty = HELD_OUT[0] | {"labels": torch.full_like(HELD_OUT[0]["labels"], -100)}
    empty["labels"][:, 0] = 1  # it is never predicted
    found = swept(model, tmp_path, CONFIGS[:1], eval_data=[*held_out, empty])
    with pytest.raises(ValueError, match="eval_data gives no batch with labels"):
        swept(model, tmp_path / "empty", CONFIGS[:1], eval_data=[empty])
    fastlora.load_adapter(model, tmp_path / "best")
    total, count = 0.0, 0
    for batch in held_out:
        with torch.no_grad():
            probabilities = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        for row, labels in zip(probabilities, batch["labels"].tolist(), strict=True):
            for place, label in enumerate(labels[1:]):
                if label != -100:
                    total, count = total - row[place, label].item(), count + 1
    assert count == 4 + 1 + 1 + 8
    assert found.best.loss == pytest.approx(total / count, rel=1e-5)


def test_the_model_is_unchanged(base, model, tmp_path):
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.train()
    before = around_values(model)
    swept(model, tmp_path, CONFIGS[:2], steps=2)
    assert around_values(model) == before
    with pytest.raises(RuntimeError, match="no more"):
        swept(model, tmp_path / "refused", loss=refuse)
    assert around_values(model) == before
    torch.testing.assert_close(model.state_dict(), base.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"configs": []}, TypeError, "configs is"),
        ({"configs": ["r2"]}, TypeError, r"configs\[0\] is 'r2'"),
        ({"configs": [{"r": 2}]}, ValueError, "learning_rate'. is None"),
        ({"configs": [{"learning_rate": 0}]}, ValueError, "learning_rate'. is 0"),
        ({"configs": [{"rank": 2, "learning_rate": 1}]}, ValueError, "has 'rank'"),
        ({"configs": [{"learning_rate": 1, "bias": "all"}]}, ValueError, "has 'bias', but"),
        ({"configs": [{"learning_rate": 1, "name": "../x"}]}, ValueError, "can't name a folder"),
        ({"configs": [{"learning_rate": 1}] * 2}, ValueError, "two of configs"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"steps": 2, "halving": True}, ValueError, "too few to halve 4 trials"),
        ({"schedule": "up"}, ValueError, "schedule is 'up'"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm is -1"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808"),
        ({"loss": 0.1}, TypeError, "loss is 0.1, but must be a function"),
        ({"data": 3}, TypeError, "data is 3, but must be a list of batches"),
        ({"eval_data": None}, TypeError, "eval_data is None, but must be a list of batches"),
        ({"data": []}, ValueError, "data gives no batch"),
        ({"data": [{"input_ids": torch.ones(1, 2)}]}, ValueError, "must be 'labels'"),
        ({"data": [{"labels": torch.ones(7)}]}, ValueError, r"'labels': \(7,\).* stack rows"),
        ({"eval_data": [{"labels": torch.full((1, 2), -100)}]}, ValueError, "batch with labels"),
    ],
)  # fmt: skip
def test_invalid_arguments(base, tmp_path, options, error, message):
    settings = {"configs": CONFIGS, "data": DATA, "eval_data": HELD_OUT, "steps": STEPS} | options
    with pytest.raises(error, match=message):
        fastlora.sweep(base, output_dir=tmp_path, progress=False, **settings)
    assert not any(hasattr(module, "_fastlora_trials") for module in base.modules())


class Once:
    def __init__(self):
        self.batches = iter(batches(2))

    def __iter__(self):
        return self.batches


def test_batches_that_can_t_be_read_again_are_an_error():
    with pytest.raises(ValueError, match="can't be read again"):
        list(islice(feed(Once(), 0, causal_loss), 3))


class Routed(nn.Module):
    """A causal model with a batch norm, and a layer that sees only every other token."""

    def __init__(self, tracked: bool = True):
        super().__init__()
        self.embed, self.first = nn.Embedding(40, 8), nn.Linear(8, 8)
        self.norm, self.expert = nn.BatchNorm1d(8, track_running_stats=tracked), nn.Linear(8, 8)

    def forward(self, input_ids, labels=None):
        x = self.first(self.embed(input_ids))
        x = self.norm(x.flatten(0, 1))
        x[::2] = self.expert(x[::2])
        logits = x.view(*input_ids.shape, 8) @ self.embed.weight.T
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class Expert(nn.Module):
    """One expert of a list; it gets all tokens, but in another order."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.experts = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8)})])

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        rows = self.experts[0]["up"](x.flatten(0, 1).flip(0)).flip(0)
        logits = rows.view_as(x) @ self.embed.weight.T
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_the_rows_of_one_of_several_experts_are_never_taken_for_all_tokens(tmp_path):
    with pytest.raises(
        ValueError, match=r"^experts\.0\.up is called with .*which trial a row belongs to"
    ):
        swept(Expert(), tmp_path, [{"r": 2, "learning_rate": 1e-2}])


def test_a_batch_norm_stays_in_evaluation_and_as_it_was(tmp_path):
    model, config = Routed(), {"r": 2, "learning_rate": 1e-2, "exclude_modules": ["expert"]}
    nn.init.uniform_(model.norm.running_var)
    base = copy.deepcopy(model.eval())
    base.train = lambda mode: base  # so that its batch norm also stays in evaluation
    with pytest.warns(UserWarning, match="norm stays in evaluation"):
        found = swept(model, tmp_path, [config, config | {"r": 3}])
    torch.testing.assert_close(model.state_dict(), base.state_dict(), rtol=0, atol=0)
    expected = alone(base, config)
    assert_alone(tmp_path / "adapters" / found.outcomes[0].trial.name, expected)
    with pytest.raises(ValueError, match="norm would mix trials"):
        swept(Routed(tracked=False), tmp_path / "untracked", [config])
    # its rows may belong to any trial
    named = r"^expert is called with .*exclude_modules=\['expert'\]"
    with (
        pytest.warns(UserWarning, match="norm stays in evaluation"),
        pytest.raises(ValueError, match=named),
    ):
        swept(Routed().eval(), tmp_path / "routed", [{"r": 2, "learning_rate": 1e-2}])


def test_schedules_and_rungs():
    def options(**changes) -> Options:
        return Options(8, True, 1, "linear", 0, 0.0, 1.0, 0)._replace(**changes)

    assert options().rungs(8) == {2: 4, 4: 2, 6: 1}
    assert options().rungs(5) == {2: 3, 4: 2, 6: 1}
    assert options().rungs(1) == {} == options(halving=False).rungs(8)
    assert [options(steps=4).factor(i) for i in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [options(warmup_steps=3).factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1]
    assert options(schedule="cosine", steps=2).factor(1) == pytest.approx(0.5)
    assert options(schedule="constant").factor(7) == 1


class Blocks(nn.Module):
    """A causal model of square layers: Conv1D, and a quantized layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(40, 256), Conv1D(256, 256)
        self.packed, self.head = quantized("gguf-q8_0", 256, 256), nn.Linear(256, 40)
        self.head.requires_grad_(False)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.packed(self.conv(self.embed(input_ids)).tanh()))
        loss = None if labels is None else causal_loss(logits, labels)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_layers_of_other_classes(tmp_path):
    model, targets = Blocks(), {"target_modules": ["conv", "packed"]}
    nn.utils.parametrizations.spectral_norm(model.head)  # its calls in training change a buffer
    configs = [{"r": r, "learning_rate": 1e-3} | targets for r in (2, 3)]
    base, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    found = swept(model, tmp_path, configs)
    assert_each_alone(base, configs, tmp_path, found)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in base.modules()]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
