"""resize_adapter: the best adapter of a lower rank, against a dense SVD and PEFT."""

import json
import math
import shutil
import warnings
from functools import partial

import peft
import pytest
import torch
from models import Mlp, randomize
from moe_models import IDS, parameters_of, seeded_model
from peft_models import by_peft, change_config, change_tensors, changes, cut, llama, relative
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.packing.files import CONFIG, WEIGHTS

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B, MAGNITUDE = (f"{LAYER}.lora_{end}" for end in ("A.weight", "B.weight", "magnitude_vector"))
UNLIKE = {
    "r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"layers.1.mlp.down_proj": 4}, "alpha_pattern": {"q_proj": -5},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return by_peft(tmp_path / "adapter", **UNLIKE)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.6}], ids=["rank", "energy"])
def test_a_cut_agrees_with_the_dense_svd(how, use_rslora, tmp_path):
    folder = by_peft(tmp_path / "adapter", **UNLIKE, use_rslora=use_rslora)
    report = fastlora.resize_adapter(folder, **how, output=tmp_path / "small")
    before, after = changes(folder), changes(tmp_path / "small")
    assert before.keys() == after.keys() == {f"{one.name}.weight" for one in report.layers}
    for one in report.layers:
        whole = before[f"{one.name}.weight"]
        values = torch.linalg.svdvals(whole)
        squares = values.square()
        wanted = int((squares.cumsum(0) < 0.6 * squares.sum()).sum()) + 1 if "energy" in how else 2
        assert one.r_after == wanted < one.r
        assert relative(after[f"{one.name}.weight"], cut(whole, wanted)) < 1e-6
        assert one.loss == pytest.approx(relative(cut(whole, wanted), whole), rel=1e-6)
        share = values[: one.r] / values[: one.r].sum()
        assert one.effective_rank == pytest.approx(float(math.e ** -(share * share.log()).sum()))
    small = load_file(tmp_path / "small" / WEIGHTS)
    assert small[A].shape[0] == wanted or "energy" in how
    assert {tensor.dtype for tensor in small.values()} == {torch.float32}


def test_adapters_that_need_no_cut_stay_bit_identical(folder, tmp_path):
    report = fastlora.resize_adapter(folder, energy=1.0, output=tmp_path / "same")
    assert [one.r for one in report.layers] == [one.r_after for one in report.layers]
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "same" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    assert all(c.equal(changes(folder)[name]) for name, c in changes(tmp_path / "same").items())


def test_a_layer_of_a_lower_rank_stays(folder, tmp_path):
    report = fastlora.resize_adapter(folder, rank=4, output=tmp_path / "small")
    lower = next(one for one in report.layers if one.name.endswith("layers.1.mlp.down_proj"))
    assert (lower.r, lower.r_after, lower.loss) == (4, 4, 0.0)
    assert all(one.loss > 0 for one in report.layers if one is not lower)


def test_values_that_are_not_there_are_cut_at_full_energy(folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    tensors[A][2:] = tensors[A][:1]  # rank 2
    save_file(tensors, folder / WEIGHTS)
    report = fastlora.resize_adapter(folder, energy=1.0, output=tmp_path / "small")
    (one,) = (each for each in report.layers if each.r_after < each.r)
    assert (one.name, one.r_after, one.loss) == ("model.layers.0.self_attn.q_proj", 2, 0.0)
    assert (
        relative(*(changes(f)[f"{one.name}.weight"] for f in (tmp_path / "small", folder))) < 1e-6
    )


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss", "nemotron"])
def test_experts_are_cut_one_by_one_to_one_rank(family, tmp_path):
    base = partial(seeded_model, family)
    first, last = parameters_of(family)
    folder = by_peft(
        tmp_path / "adapter", base(), r=4, lora_alpha=6, target_modules=["q_proj"],
        target_parameters=[first, last], rank_pattern={first: 3},
    )  # fmt: skip
    report = fastlora.resize_adapter(folder, energy=0.7, output=tmp_path / "small")
    before, after = changes(folder, base), changes(tmp_path / "small", base)
    stacks = [one for one in report.layers if "experts" in one.name]
    assert stacks
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "small" / WEIGHTS).values())
    assert str(report).endswith(f"{count:,} after")
    assert {one.r for one in stacks if one.name.endswith(first)} == {3}
    for one in stacks:
        whole, r = before[one.name], one.r_after
        squares = torch.linalg.svdvals(whole).square().sum(0)
        assert r == int((squares.cumsum(0) < 0.7 * squares.sum()).sum()) + 1
        assert relative(after[one.name], cut(whole, r)) < 1e-6
    one = fastlora.load_adapter(base(), tmp_path / "small")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(one(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_modules_to_save_are_kept(tmp_path):
    settings = {"target_modules": ["up"], "bias": "all", "modules_to_save": ["head"], "r": 4}
    by_peft(tmp_path / "adapter", Mlp(), **settings)
    fastlora.resize_adapter(tmp_path / "adapter", rank=2, output=tmp_path / "small")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "small"))
    assert before.keys() == after.keys()
    kept = [key for key in before if "lora_" not in key]
    assert len(kept) == 7  # PEFT has some under two names
    assert all(before[key].equal(after[key]) for key in kept)


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_model_in_memory(name, tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4))
    model.add_adapter("other", peft.LoraConfig(r=5))
    randomize(model).base_model.set_adapter("other")
    randomize(model).save_pretrained(tmp_path / "whole", selected_adapters=["default", "other"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folder = tmp_path / "whole" / ("other" if name == "other" else "")
    wanted = fastlora.resize_adapter(folder, rank=2, output=tmp_path / "a")
    found = fastlora.resize_adapter(model, rank=2, output=tmp_path / "b", adapter_name=name)
    assert str(found) == str(wanted)
    assert {one.r for one in found.layers} == {5 if name == "other" else 4}
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="adapter_name is 'third', not one of default, other"):
        fastlora.resize_adapter(model, adapter_name="third")


def test_a_model_whose_save_pretrained_is_not_peft_s():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4))
    inside = model.get_base_model()
    inside.peft_config = model.peft_config  # transformers' add_adapter leaves a model in this state
    for other in (inside, model.base_model):
        with pytest.raises(ValueError, match="must be a PeftModel: save the adapter"):
            fastlora.resize_adapter(other)


def test_the_report_is_a_table_and_a_picture(folder, tmp_path):
    report = fastlora.resize_adapter(folder, rank=3)
    titles, first, *_, last = str(report).splitlines()
    assert titles.split() == ["layer", "rank", "effective", "rank", "rank", "after", "lost"]
    one = report.layers[0]
    assert first.split() == [
        one.name, "6", f"{one.effective_rank:.1f}", "3", f"{one.loss:.4f}"
    ]  # fmt: skip
    sizes = [(64, 64), (96, 64)] * 2
    after = sum(3 * (p + q) for p, q in sizes)
    assert last.endswith(
        f"{sum(6 * (p + q) for p, q in sizes) - 2 * 160:,} parameters before, {after:,} after"
    )
    report.plot(tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "spectra.png"]


BEGAN = {
    "True": {"init_lora_weights": True, "eva_config": {"rho": 2.0}},
    "False": {"init_lora_weights": False, "loftq_config": {"loftq_bits": 4}},
    "gaussian": {"init_lora_weights": "Gaussian"},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "converted": {"init_lora_weights": True, "corda_config": {}, "lora_ga_config": {}},
}


def resized(folder, output):
    fastlora.resize_adapter(folder, rank=3, output=output)


def resized_in_memory(folder, output):
    with warnings.catch_warnings():
        # PEFT warns about settings that belong to other initial values
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(llama(), folder)
    fastlora.resize_adapter(model, rank=3, output=output)


def combined(folder, output):
    fastlora.resize_adapter(folder, rank=3, output=output.with_name("small"))
    fastlora.combine_adapters([folder, output.with_name("small")], [1, 1], output, rank=5)


# combined reads a folder as resized does.
WAYS = [(each, made) for each in BEGAN for made in (resized, resized_in_memory)]
WAYS += [("eva", combined)]


@pytest.mark.parametrize(("began", "made"), WAYS)
def test_peft_does_not_repeat_the_initialization_of_a_resized_adapter(began, made, tmp_path):
    """At an odd rank, for which orthogonal initialization is impossible."""
    folder = by_peft(tmp_path / "adapter", r=6, target_modules=["q_proj"])
    change_config(folder, **BEGAN[began])
    made(folder, tmp_path / "made")
    config = json.loads((tmp_path / "made" / CONFIG).read_text())
    assert config["r"] % 2
    assert config["init_lora_weights"] is True
    started_by = ("eva_config", "loftq_config", "corda_config", "lora_ga_config")
    assert not any(config.get(name) for name in started_by)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "made")
    ours = fastlora.load_adapter(llama(), tmp_path / "made")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initializations_that_change_the_base_work_after_peft_s_conversion(init, tmp_path):
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=3, init_lora_weights=init, target_modules=["q_proj"])
    )
    theirs.peft_config["default"].init_lora_weights = True  # for the file of the initial values
    theirs.save_pretrained(tmp_path / "first")
    theirs.peft_config["default"].init_lora_weights = init
    randomize(theirs).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=f"'{init}', which changes the base"):
        fastlora.resize_adapter(tmp_path / "whole", rank=3, output=tmp_path / "small")
    with torch.no_grad():
        wanted = theirs(IDS).logits
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "first"
    )
    fastlora.resize_adapter(tmp_path / "converted", energy=1.0, output=tmp_path / "small")
    found = peft.PeftModel.from_pretrained(llama(), tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_initializations_that_change_the_base_are_refused(init, folder, tmp_path):
    change_config(folder, init_lora_weights=init)
    for read in (resized, combined):
        with pytest.raises(ValueError, match=f"'{init}', which changes the base"):
            read(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def torn(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


BROKEN = {
    "torn": (torn, "damaged"),
    "NaN": (
        lambda f: change_tensors(f, lambda t: t[B].fill_(math.nan)),
        "NaN or infinity in model.layers.0.self_attn.q_proj",
    ),
    "no-lora-b": (
        lambda f: change_tensors(f, lambda t: t.pop(B)),
        "has missing or unsupported keys, .*q_proj.lora_B.weight",
    ),
    "dora-tensor": (
        lambda f: change_tensors(f, lambda t: t.update({MAGNITUDE: torch.ones(64)})),
        "lora_magnitude_vector: .*neither DoRA's magnitudes",
    ),
    "dora": (lambda f: change_config(f, use_dora=True), "use_dora=True"),
    "rank": (lambda f: change_config(f, r=5), "says that its rank is 5"),
    "unlike": (
        lambda f: change_tensors(f, lambda t: t.update({B: torch.ones(64, 7)})),
        r"lora_A \(6, 64\) of .* and lora_B \(64, 7\) of .* for model.layers.0.self_attn.q_proj",
    ),
    "convolution": (
        lambda f: change_tensors(f, lambda t: t.update({A: torch.ones(6, 64, 3, 3)})),
        "convolutions aren't supported",
    ),
    "large": (
        lambda f: change_tensors(f, lambda t: t.update({A: t[A].double() * 1e308})),
        "q_proj has a product that is too large for float64",
    ),
    "empty": (lambda f: change_tensors(f, dict.clear), "no lora_A and no lora_B: it holds no adap"),
    "int8": (
        lambda f: change_tensors(f, lambda t: t.update({A: t[A].to(torch.int8)})),
        "of torch.int8 and lora_B .* of torch.float32 for .*q_proj.* must be floating-point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_clear_line(name, folder, tmp_path):
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        fastlora.resize_adapter(folder, rank=2, output=tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "r is 0"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": math.nan}, "energy is nan"),
        ({"rank": 2, "energy": 0.5}, "give only one"),
        ({}, "nothing is cut: give rank or energy"),
    ],
)
def test_invalid_arguments(settings, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        fastlora.resize_adapter(folder, **settings, output=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_an_output_that_would_be_spoilt(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for own in (folder, folder / ".." / "adapter"):
        with pytest.raises(ValueError, match="which is also an input"):
            fastlora.resize_adapter(folder, rank=2, output=own)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"which has notes\.txt in it"):
        fastlora.resize_adapter(folder, rank=2, output=tmp_path / "else")
    with pytest.raises(ValueError, match="which is a file"):
        fastlora.resize_adapter(folder, rank=2, output=folder / CONFIG)
    shutil.copytree(folder, tmp_path / "old", ignore=shutil.ignore_patterns("README.md"))
    fastlora.resize_adapter(folder, rank=2, output=tmp_path / "old")  # over another adapter
    assert load_file(tmp_path / "old" / WEIGHTS)[A].shape == (2, 64)
