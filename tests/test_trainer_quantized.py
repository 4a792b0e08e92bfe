"""Trainer on quantized bases made by from_pretrained.

Vendors that aren't installed are skipped.  Two of transformers' quantizers refuse a CPU although
they run on one; the tests replace these two checks.  A run that is stopped and resumed in a new
process's model is bit-equal to a run without interruption.
"""

import copy
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import peft
import pytest
import torch
import transformers
from gguf_models import INNER, WIDTH, write_model
from models import randomize, tiny_llama
from packed import NEEDS_5
from pages import ROOT, blocks_of
from torch import nn
from trainer_runs import STEPS, VOCABULARY, losses, stopped_and_resumed, trainer_for
from transformers import Trainer

import fastlora

_SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": VOCABULARY}
_OLD = transformers.__version__.startswith("4.")
_QUANTIZERS = "transformers.quantizers.quantizer"


def _bitsandbytes(folder: Path, **settings) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    return _load(folder, transformers.BitsAndBytesConfig(**settings))


def _torchao(folder: Path, name: str, **settings) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao isn't installed")
    if "group" in settings:
        settings["granularity"] = quantization.PerGroup(settings.pop("group"))
    config = getattr(quantization, f"{name}Config")(**settings)
    return _load(folder, transformers.TorchAoConfig(config))


def _hqq(folder: Path) -> nn.Module:
    pytest.importorskip("hqq", reason="HQQ isn't installed")
    try:
        return _load(folder, transformers.HqqConfig(nbits=4, group_size=32), device_map=None)
    except NotImplementedError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def _float8(folder: Path) -> nn.Module:
    if _OLD:
        pytest.skip(f"transformers {transformers.__version__} makes FP8 only on a GPU")
    check = f"{_QUANTIZERS}_finegrained_fp8.is_torch_xpu_available"
    with mock.patch(check, return_value=True):
        return _load(folder, transformers.FineGrainedFP8Config(weight_block_size=(32, 32)))


def _gguf(folder: Path, packed: bool) -> nn.Module:
    """A model from a GGUF file: LFM2's blocks stay packed in transformers, Llama's become dense."""
    pytest.importorskip("gguf", reason="gguf isn't installed")
    module = pytest.importorskip(f"{_QUANTIZERS}_gguf", reason=NEEDS_5)
    write_model(folder, "lfm2" if packed else "llama")
    kernel = SimpleNamespace(supports=lambda kind: True)  # it is never called on a CPU
    with mock.patch.object(module, "get_gguf_kernel", return_value=kernel):
        config = transformers.GgufConfig(dequantize=False)
        return _load(folder, config, gguf_file="model.gguf", attn_implementation="eager")


def _load(folder: Path, config, device_map="cpu", **settings) -> nn.Module:
    settings |= {"dtype": torch.float32, "device_map": device_map, "quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


_FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_MAKERS = {
    "nf4": partial(_bitsandbytes, **_FOUR, bnb_4bit_compute_dtype=torch.float32),
    "nf4-nested": partial(_bitsandbytes, **_FOUR, bnb_4bit_use_double_quant=True),
    "int8": partial(_bitsandbytes, load_in_8bit=True, llm_int8_threshold=0.0),
    "torchao-int8": partial(_torchao, name="Int8WeightOnly"),
    "torchao-int4": partial(_torchao, name="IntxWeightOnly", weight_dtype=torch.int4, group=32),
    "hqq": _hqq,
    "float8": _float8,
    "gguf": partial(_gguf, packed=True),
    "gguf-made-dense": partial(_gguf, packed=False),
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that returns the folder of a kind of base."""
    root = tmp_path_factory.mktemp("bases")

    def of(kind):
        if not (root / kind).exists():
            torch.manual_seed(1)
            tiny_llama(**_SIZES).save_pretrained(root / kind)
        return root / kind

    return of


def adapted(kind: str, folder, seed: int = 2) -> nn.Module:
    model = _MAKERS[kind](folder(kind))
    torch.manual_seed(seed)
    every = kind == "float8"  # its own layers compute only on a GPU
    targets = "all-linear" if every else r".*\.(q_proj|down_proj|w2)"
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.2)
    return randomize(fastlora.get_peft_model(model, config), 0.1)


def outcome(trainer: Trainer) -> tuple:
    trained = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    return trained, [entry["loss"] for entry in losses(trainer)], trainer.evaluate()["eval_loss"]


# Each vendor's layers, once.
@pytest.mark.parametrize(
    "kind", ["nf4-nested", "int8", "torchao-int4", "hqq", "float8", "gguf", "gguf-made-dense"]
)
def test_a_resumed_run_is_the_run_without_a_stop(kind, folder, tmp_path):
    make = partial(adapted, kind, folder)
    resumed, whole = stopped_and_resumed(make, tmp_path, Trainer, **EVALUATED)
    (got, *numbers), (expected, *expected_numbers) = outcome(resumed), outcome(whole)
    assert len(numbers[0]) == STEPS
    assert numbers == expected_numbers
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    start = [p for p in adapted(kind, folder).parameters() if p.requires_grad]
    assert not any(torch.equal(*pair) for pair in zip(got, start, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "float8"])
def test_trainer_loads_the_best_one_at_the_end(kind, folder, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 1}
    best |= {"greater_is_better": True}  # so that it isn't the last
    run = trainer_for(adapted(kind, folder), tmp_path, Trainer, **EVALUATED | best)
    run.train()
    assert run.state.best_global_step == 1
    assert run.evaluate()["eval_loss"] == run.state.best_metric


@pytest.mark.parametrize("kind", ["gguf", "float8"])
def test_the_example_of_the_documentation_trains_it(kind, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_model, ids = partial(_MAKERS[kind], folder(kind)), torch.arange(8)
    names = {"load_model": load_model, "model": load_model(), "batch": {"input_ids": ids[None]}}
    names["arguments"] = transformers.TrainingArguments("run", max_steps=1, use_cpu=True)
    names["rows"] = [{"input_ids": ids, "labels": ids}]
    for code in blocks_of(ROOT / "docs/quantized.md", "python"):
        exec(code, names)
    assert not fastlora.coverage(names["model"]).not_fast
    assert names["trainer"].state.global_step == 1


def test_model_init_makes_a_quantized_model(folder, tmp_path):
    run = trainer_for(None, tmp_path, max_steps=1, model_init=lambda: adapted("gguf", folder))
    run.train()
    assert len(losses(run)) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_too(copied, folder, tmp_path):
    model = copied(adapted("int8", folder))
    trainer_for(model, tmp_path, Trainer, max_steps=1).train()


@pytest.mark.parametrize("kind", ["int8", "torchao-int8", "gguf-made-dense", "float8"])
def test_a_merged_model_is_saved_and_loaded(kind, folder, tmp_path):
    merged = adapted(kind, folder).merge_and_unload()
    merged.save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(VOCABULARY)[None]
    torch.testing.assert_close(found(input_ids=ids).logits, merged.eval()(input_ids=ids).logits)
