"""combine_adapters: the weighted sum of the adapters' changes, as PEFT computes the changes."""

import pytest
import torch
from models import Mlp
from moe_models import parameters_of, seeded_model
from peft_models import assert_changes, by_peft, change_config, change_tensors, changes, cut, llama
from safetensors.torch import load_file

import fastlora
from fastlora.packing.files import WEIGHTS

WEIGHTS_OF_EACH = [0.75, -2.0, 1.0]


@pytest.fixture
def folders(tmp_path):
    """Adapters with different ranks, scales, and sets of layers."""
    return [
        by_peft(tmp_path / "a", r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"]),
        by_peft(
            tmp_path / "b", r=5, use_rslora=True, target_modules=["q_proj", "up_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 3},
        ),
        by_peft(tmp_path / "c", r=1, target_modules=["q_proj"], lora_alpha=0),
    ]  # fmt: skip


def summed(folders, weights, base=llama) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, change in changes(folder, base).items():
            total[name] = total.get(name, 0) + weight * change
    return total


def test_the_sum_is_exact_and_its_ranks_add_up(folders, tmp_path):
    change_tensors(folders[1], lambda t: t.update({key: x.double() for key, x in t.items()}))
    report = fastlora.combine_adapters(folders, WEIGHTS_OF_EACH, tmp_path / "sum")
    kinds = {
        key.split(".")[-3]: x.dtype for key, x in load_file(tmp_path / "sum" / WEIGHTS).items()
    }
    assert kinds == {"q_proj": torch.float64, "up_proj": torch.float64, "o_proj": torch.float32}
    assert_changes(changes(tmp_path / "sum"), summed(folders, WEIGHTS_OF_EACH))
    ranks = {one.name: (one.r, one.r_after) for one in report.layers}
    assert ranks["model.layers.0.self_attn.q_proj"] == (6, 6)
    assert ranks["model.layers.1.self_attn.q_proj"] == (9, 9)
    assert ranks["model.layers.1.mlp.up_proj"] == (5, 5)


def test_a_sum_that_is_cut_is_the_best_of_its_rank(folders, tmp_path):
    folders = [folders[1], folders[0], folders[2]]  # the adapter with rsLoRA comes first
    report = fastlora.combine_adapters(folders, WEIGHTS_OF_EACH, tmp_path / "sum", rank=4)
    assert {one.r_after for one in report.layers} == {3, 4}
    wanted = {name: cut(whole, 4) for name, whole in summed(folders, WEIGHTS_OF_EACH).items()}
    assert_changes(changes(tmp_path / "sum"), wanted)


def test_adapters_on_one_and_on_both_expert_weights_are_summed(tmp_path):
    both, last = parameters_of("qwen3"), "experts.down_proj"
    settings = {"target_modules": ["q_proj"], "r": 2}
    folders = [
        # experts can't have dropout
        by_peft(tmp_path / "c", seeded_model(), **settings, lora_dropout=0.1),
        by_peft(tmp_path / "a", seeded_model(), **settings, target_parameters=[last]),
        by_peft(tmp_path / "b", seeded_model(), **settings, target_parameters=both),
    ]
    fastlora.combine_adapters(folders, [1, 1, 0.5], tmp_path / "sum")
    wanted = summed(folders, [1, 1, 0.5], seeded_model)
    assert_changes(changes(tmp_path / "sum", seeded_model), wanted)


def test_modules_that_trained_in_full_are_refused(tmp_path):
    settings = {"target_modules": ["up"], "modules_to_save": ["head"]}
    folder = by_peft(tmp_path / "a", Mlp(), **settings)
    with pytest.raises(ValueError, match=r"have .*head.*can't be summed"):
        fastlora.combine_adapters([folder, folder], [1, 1], tmp_path / "sum")


def test_a_name_that_ends_others_is_its_own(tmp_path):
    """A list with "q" would also match layers.1.q, which neither adapter has."""

    def base():
        torch.manual_seed(3)
        layers = [torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8)}) for _ in range(2)]
        model = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8)})
        return model.update({"layers": torch.nn.ModuleList(layers)}) or model

    folders = [
        by_peft(tmp_path / "a", base(), target_modules="q", r=2),
        by_peft(tmp_path / "b", base(), target_modules=["layers.0.q"], r=3),
    ]
    fastlora.combine_adapters(folders, [1, 2], tmp_path / "sum")
    wanted, found = summed(folders, [1, 2], base), changes(tmp_path / "sum", base)
    assert found.keys() == {"q.weight", "layers.0.q.weight"}
    assert_changes(found, wanted)
    own = fastlora.load_adapter(base(), tmp_path / "sum")
    assert len(fastlora.coverage(own).layers) == 2


def test_adapters_that_cancel_give_zero(folders, tmp_path):
    report = fastlora.combine_adapters([folders[0]] * 2, [1, -1], tmp_path / "sum", rank=4)
    assert report.effective_rank == report.loss == 0.0
    assert not changes(tmp_path / "sum")


def test_a_head_s_adapter_and_none_are_summed(tmp_path):
    """PEFT writes a copy of the frozen head into the first adapter's file."""
    both = [tmp_path / "head", tmp_path / "none"]
    by_peft(both[0], target_modules=["q_proj", "lm_head"])
    by_peft(both[1], target_modules=["q_proj"])
    fastlora.combine_adapters(both, [1, 0.5], tmp_path / "sum")
    assert_changes(changes(tmp_path / "sum"), summed(both, [1, 0.5]))


def unlike_base(folders):
    for folder, name in zip(folders, ("gpt2", "opt", None), strict=True):
        change_config(folder, base_model_name_or_path=name)


def unlike_shape(folders):
    def narrow(tensors):
        tensors |= {key: x[:, :60].clone() for key, x in tensors.items() if "_A." in key}

    change_tensors(folders[2], narrow)


BAD = {
    "base": (unlike_base, {}, "base_model_name_or_path 'gpt2' and 'opt'"),
    "shape": (unlike_shape, {}, r"q_proj has unlike shapes .*\[\(1, 64, 60\), \(1, 64, 64\)\]"),
    "weights": (None, {"weights": [1]}, r"weights is \[1\], but must be a list of 3"),
    "nan": (None, {"weights": [1, float("nan"), 1]}, "weights is .*nan, 1., but must be"),
    "large": (None, {"weights": [1, 1e300, 1]}, "would have numbers that are too large for torch"),
}


@pytest.mark.parametrize("name", BAD)
def test_adapters_that_can_t_be_summed_give_a_one_line_error(name, folders, tmp_path):
    change, settings, message = BAD[name]
    if change:
        change(folders)
    call = {"folders": folders, "weights": WEIGHTS_OF_EACH, "output": tmp_path / "sum"} | settings
    with pytest.raises(ValueError, match=message) as caught:
        fastlora.combine_adapters(**call)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sum").exists()
