"""An adapter file, written by PEFT or by fastlora, gives the same model in both, also merged."""

import json
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from tempfile import TemporaryDirectory
from typing import NamedTuple

import peft
import pytest
import torch
from models import Mlp, Places, Tied, randomize, tiny_llama
from packaging import version
from peft_models import bert, gpt2
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import LoRAConfig
from fastlora.model.checkpoint import CONFIG, WEIGHTS

pytestmark = [
    # PEFT 0.21 warns about patterns for target_parameters, although it uses them.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


NUMBERS = count()


def seeded(make: Callable[..., nn.Module], *args, seed: int = 3, **settings) -> nn.Module:
    torch.manual_seed(seed)
    return make(*args, **settings).eval()


def llama(**settings) -> nn.Module:
    return seeded(tiny_llama, num_hidden_layers=3, **settings)


@cache
def files_of(tied: bool) -> TemporaryDirectory:
    """The files of a base model, whose config has its number of tokens."""
    folder = TemporaryDirectory()
    llama(tie_word_embeddings=tied).save_pretrained(folder.name)
    return folder


def with_new_tokens(tied: bool) -> nn.Module:
    """The base from its files, with new tokens that are random in each call."""
    model = LlamaForCausalLM.from_pretrained(files_of(tied).name).eval()
    torch.manual_seed(next(NUMBERS))
    model.resize_token_embeddings(104, mean_resizing=False)
    return model


def conv1d_and_linear(order: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(8, 8), Conv1D(8, 8)][::order])


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "vocab_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "head_dim": 8}
MIXTURES = {  # with dense layers, whose configs PEFT rewrites when it loads them
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]},
    "qwen3_moe-all-dense": {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0, 1]},
    "deepseek_v3": DEEPSEEK,
    "ernie4_5_moe": ERNIE | {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
}


def mixture(kind: str) -> nn.Module:
    config = AutoConfig.for_model(kind.removesuffix("-all-dense"), **SIZES | MIXTURES[kind])
    return AutoModelForCausalLM.from_config(config)


class Case(NamedTuple):
    make: Callable[..., nn.Module]
    x: Tensor
    settings: dict
    close: dict = {}  # noqa: RUF012
    same_keys: bool = True  # same keys as in PEFT's file, except for its copies of modules_to_save


TOKENS = torch.arange(100)[None, -12:]
ALL_LINEAR = {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*(experts|gate|router)"}
PATTERNS = ALL_LINEAR | {
    "use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"up_proj": 5},
}  # fmt: skip
UP = {"target_modules": ["up"]}
ROUGH = {"rtol": 1e-4, "atol": 1e-5}


def of(make: Callable, x: Tensor, cases: dict[str, dict], *rest) -> dict[str, Case]:
    return {name: Case(make, x, settings, *rest) for name, settings in cases.items()}


MLP = of(
    partial(seeded, Mlp), torch.randn(5, 8),
    {
        "plain": {"target_modules": ["up", "down"]},
        "regex": {"target_modules": "(up|down)"},
        "rslora": UP | {"use_rslora": True, "lora_alpha": 3},
        "patterns": {
            "target_modules": ["up", "down"], "r": 4, "rank_pattern": {"up": 2},
            "alpha_pattern": {"down": 5, "u.": 7},
        },
        "bias-all": UP | {"bias": "all"},
        "bias-lora_only": UP | {"bias": "lora_only"},
        "modules_to_save": UP | {"modules_to_save": ["head", "norm"]},
        "bias-all-and-modules_to_save": UP | {"bias": "all", "modules_to_save": ["head"]},
        "exclude": {"target_modules": "all-linear", "exclude_modules": ["head"]},
    },
)  # fmt: skip
LAYERS = of(
    llama, TOKENS,
    {
        "layers-numbers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        "layers-patterns": {
            "target_modules": ["q_proj"], "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
        "layers-and-a-whole-name": {
            "target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": [0],
        },
        "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        "one-norm": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
        "by-their-weights": {
            "target_modules": ["o_proj"], "target_parameters": ["q_proj.weight", "up_proj.weight"],
            "rank_pattern": {"q_proj": 3},  # not the name of its weight
            "alpha_pattern": {"up_proj.weight": 5, "o_proj": 2},
        },
    },
)  # fmt: skip
NEW_TOKENS = {
    "plain": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both-in-full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "head-in-full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
PLACES = of(
    partial(seeded, Places), torch.randn(3, 8),
    {
        "another-layer": {"target_modules": ["own"]},
        "layers-of-a-block": {"target_modules": ["up", "down", "own"], "bias": "lora_only"},
        "in-full-in-a-block": UP | {"modules_to_save": ["norm"]},
    },
)  # fmt: skip
CASES = MLP | LAYERS | {f"places-{name}": case for name, case in PLACES.items()}
for tied in (False, True):
    make = partial(with_new_tokens, tied)
    for name, case in of(make, TOKENS, NEW_TOKENS, ROUGH, False).items():
        CASES[f"new-tokens-{name}{'-tied' * tied}"] = case
X, IDS = torch.randn(3, 8), torch.arange(12)[None]
CASES |= {
    # PEFT's file has the biases of a block once for each of its places.
    "places-all-biases": Case(partial(seeded, Places), X, UP | {"bias": "all"}, {}, False),
    "tied-module-to-save": Case(
        partial(seeded, Tied), torch.arange(5),
        {"target_modules": ["mix"], "modules_to_save": ["head"]},
    ),
    "classifier": Case(
        partial(seeded, bert), IDS[:, :5], {"task_type": "SEQ_CLS", "target_modules": ["query"]},
    ),
    "gpt2": Case(
        partial(seeded, gpt2), TOKENS, {"target_modules": "all-linear", "bias": "lora_only"}, ROUGH
    ),
    "qwen3_moe-regex": Case(
        partial(seeded, mixture, "qwen3_moe"), IDS,
        {"target_modules": r"model\.layers\.0\..*(q_proj|down_proj)"}, ROUGH, False,
    ),
}  # fmt: skip
for name, order in (("conv1d-last", 1), ("linear-last", -1)):
    make = partial(seeded, conv1d_and_linear, order)
    CASES[name] = Case(make, X, {"target_modules": ["0", "1"]})
for kind in MIXTURES:
    make, one = partial(seeded, mixture, kind), {"target_modules": ["down_proj"]}
    CASES[f"{kind}-patterns"] = Case(make, IDS, PATTERNS, ROUGH, False)
    if kind in ("qwen3_moe", "deepseek_v3"):
        CASES[f"{kind}-one-projection"] = Case(make, IDS, one, ROUGH, False)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model.eval()(x)
    return getattr(y, "logits", y)


# Files of older PEFT versions that describe no model of today, and the error message.
REFUSED_OF = {
    "0.21": (("bias-lora_only", "gpt2"), "PEFT before 0.21 leaves trained biases"),
    "0.21.0": (  # it adapts other layers
        ("places-layers-of-a-block", "places-in-full-in-a-block", "places-all-biases"),
        "not known base_model.model.blocks.2",
    ),
    "0.19.1": (("by-their-weights",), "reads adapters of experts from PEFT 0.19.1"),
}


@pytest.mark.parametrize("name", CASES)
def test_files_are_peft_s_both_ways(name, tmp_path):
    make, x, settings, close, same_keys = CASES[name]
    ours = randomize(fastlora.apply_lora(make(), LoRAConfig(**settings)), 0.1)
    fastlora.save_adapter(ours, tmp_path / "ours")
    y = run(ours, x)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(run(theirs, x), y, **close)

    theirs = randomize(peft.get_peft_model(make(), peft.LoraConfig(**settings)), 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    for older, (names, says) in REFUSED_OF.items():
        if name in names and version.parse(peft.__version__) < version.parse(older):
            with pytest.raises(ValueError, match=says):
                fastlora.load_adapter(make(), tmp_path / "theirs")
            return
    loaded = fastlora.load_adapter(make(), tmp_path / "theirs")
    torch.testing.assert_close(run(loaded, x), run(theirs, x), **close)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (loaded, theirs)]
    assert trained[0] == trained[1]
    configs = [json.loads((tmp_path / side / CONFIG).read_text()) for side in ("ours", "theirs")]
    assert configs[0]["fan_in_fan_out"] == configs[1]["fan_in_fan_out"]
    files = [load_file(tmp_path / side / WEIGHTS) for side in ("ours", "theirs")]
    shapes, their_shapes = ({key: tensor.shape for key, tensor in file.items()} for file in files)
    copies = [k for k in their_shapes if ".original_module." in k or ".modules_to_save." in k]
    assert not same_keys or shapes == {k: v for k, v in their_shapes.items() if k not in copies}

    again, existing = (fastlora.load_adapter(make(), tmp_path / "ours") for _ in range(2))
    fastlora.load_adapter(randomize(existing), tmp_path / "ours")  # into the existing adapters
    assert torch.equal(run(again, x), y)
    assert torch.equal(run(existing, x), y)
    fastlora.save_adapter(again, tmp_path / "again")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()

    close = {"rtol": 1e-3, "atol": 1e-4} | close
    before = [type(module) for module in make().modules()]
    torch.testing.assert_close(run(fastlora.merge_lora(ours), x), y, **close)
    torch.testing.assert_close(run(fastlora.remove_lora(ours), x), y, **close)
    assert [type(module) for module in ours.modules()] == before
