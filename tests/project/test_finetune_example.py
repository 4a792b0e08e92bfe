"""examples/finetune.py and sweep.py as users run them, with tiny models and a generated text."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from gguf_models import write_model
from pages import save_tiny_model
from safetensors.torch import save_file

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
WORDS = ["a", "layer", "keeps", "its", "weight", "and", "bias", "while", "the", "adapter", "learns"]
TEXT = " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(3000))
FAST = "--steps=6", "--batch=2", "--seq-len=32", "--lr=0.01", "--dtype=float32", "--device=cpu"
TEMPORARY = (".finetune-*", ".fastlora-*", "*.tmp", "*.partial")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options for a random Llama of two layers, and for a text."""
    for package in ("accelerate", "matplotlib", "peft", "tqdm"):
        pytest.importorskip(package, reason=f"the example uses {package}")
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(folder)
    (folder / "text.txt").write_text(TEXT)
    return ["--model", model, "--data", folder / "text.txt", *FAST]


@pytest.fixture(scope="module")
def compared(inputs, tmp_path_factory):
    """One run of all four sides without dropout: its output, its folder, and its report."""
    out = tmp_path_factory.mktemp("compared") / "out"
    code, printed, errors = finetune(*inputs, "--out", out, "--dropout", "0", "--int8")
    assert code == 0, errors
    report = json.loads((out / "loss.json").read_text())
    return SimpleNamespace(printed=printed, out=out, report=report)


def finetune(*arguments, script=SCRIPT):
    """Run the script; returns its exit code and its output."""
    # One thread: a tiny model gains nothing from more, and other tests may run at the same time.
    own = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_results_are_written_whole(compared):
    out = compared.out
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    kept = [f"checkpoints/{side}/checkpoint-6" for side in ("fastlora", "PEFT", "int8")]
    adapters = {f"{folder}/adapter_model.safetensors" for folder in ("adapter", *kept)}
    assert {"loss.png", "loss.json", "adapter/adapter_config.json", *adapters} <= files
    assert [path for pattern in TEMPORARY for path in out.rglob(pattern)] == []
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "loss.json").read_text().splitlines()) < 120


def test_losses_fall_and_follow_peft(compared):
    ours, theirs = (compared.report["results"][each] for each in ("fastlora", "PEFT"))
    for curve in ("loss", "held_out_loss"):
        assert numpy.isfinite(ours[curve]).all()
        assert [step for step, _ in ours[curve]] == [step for step, _ in theirs[curve]]
        losses = [loss for _, loss in theirs[curve]]
        assert [loss for _, loss in ours[curve]] == pytest.approx(losses, rel=1e-3)
    (first, before), *_, (last, after) = ours["held_out_loss"]
    assert (first, last) == (0, 6)
    assert after < before - 0.05


def test_table_has_all_sides(compared):
    printed, results = compared.printed, compared.report["results"]
    assert printed.count("layers fast (backend torch)") == 2
    for name, side in results.items():
        trained = 0 if name == "frozen" else results["fastlora"]["trainable_parameters"]
        assert side["trainable_parameters"] == trained
        assert f"{side['tokens_per_second']:.0f}" in printed
    assert results["fastlora"]["kept_for_backward"] <= results["PEFT"]["kept_for_backward"]
    for base in ("PEFT", "frozen"):
        ratios = compared.report[f"step_time_over_{base.lower()}"]
        assert ratios.keys() == results.keys() - {base}
        for side, ratio in ratios.items():
            ours, theirs = (numpy.array(results[each]["seconds_per_step"]) for each in (side, base))
            low, middle, high = numpy.percentile(ours / theirs, [25, 50, 75])
            assert ratio["pairs"] == pytest.approx(ours / theirs)
            assert (ratio["median"], *ratio["quartiles"]) == pytest.approx((middle, low, high))
            assert f"{middle:.3f} ({low:.3f}–{high:.3f})" in printed
    in_8_bits, *dense = (
        results[each]["weights_resident"] for each in ("int8", "PEFT", "fastlora", "frozen")
    )
    assert in_8_bits < min(dense) == max(dense)
    if sys.platform == "linux":  # each side's memory is measured in its own process
        for side in results.values():
            assert side["kept_for_backward"] / 4 < side["peak_memory_growth"] < 2**29


def test_the_last_sentence_is_the_results(compared, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    sentence_of = importlib.import_module("table").sentence_of
    last = compared.printed.splitlines()[-1]
    assert last == sentence_of(compared.report)
    assert last.startswith("fastlora, compared with PEFT: ")

    def said(time: float, quartiles: list[float], memory: int | None, loss: float) -> str:
        side = {"peak_memory_growth": memory, "held_out_loss": [[0, 3.0], [8, loss]]}
        peft_s = {"peak_memory_growth": 200, "held_out_loss": [[0, 3.0], [8, 2.3]]}
        ratio = {"median": time, "quartiles": quartiles}
        report = {"results": {"PEFT": peft_s, "fastlora": side}}
        return sentence_of(report | {"step_time_over_peft": {"fastlora": ratio}})

    better = "1.37 × faster, 52 % less memory for training, the same held-out loss (2.301, 2.300)"
    assert said(0.729, [0.68, 0.73], 96, 2.301) == f"fastlora, compared with PEFT: {better}"
    noise = (
        "neither faster nor slower (the steps vary too much), another held-out loss (nan, 2.300)"
    )
    assert said(0.97, [0.9, 1.1], None, numpy.nan) == f"fastlora, compared with PEFT: {noise}"


def test_a_llama_s_gguf_is_trained_as_it_lies(tmp_path, monkeypatch):
    """llama.cpp stores the rows of q and k in another order; the logits agree with
    transformers'.
    """
    pytest.importorskip("gguf", reason="--quantized reads GGUF")
    layers = "transformers.integrations.gguf.dequant"
    pytest.importorskip(layers, reason="an older transformers has no layer for GGUF's blocks")
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(SCRIPT.parent)
    quantized = importlib.import_module("quantized")
    write_model(tmp_path, "llama", "Q4_1")
    ids = torch.arange(32)[None] % 12  # transformers loads a kernel from the Hub for fewer rows
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    expected.config.save_pretrained(tmp_path)
    save_file(expected.state_dict(), tmp_path / "model.safetensors")  # for the dense parameters
    packed = quantized.model_of_gguf(SimpleNamespace(model=str(tmp_path), dtype="float32"))
    assert {layer.ggml_type for layer in packed.modules() if hasattr(layer, "ggml_type")} == {3}
    torch.testing.assert_close(packed(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_experts_train_as_peft_s(inputs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    small_moe = importlib.import_module("small_moe")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    small_moe.make(tmp_path / "moe", 0, {"hidden_size": 32, "head_dim": 16} | layers | experts)
    options = ["--experts", "--model", tmp_path / "moe", "--out", tmp_path / "out", "--steps=2"]
    code, printed, errors = finetune(*inputs[2:], *options)
    assert code == 0, errors
    assert "right: saved and loaded by PEFT" in printed  # this includes a comparison of logits
    report = json.loads((tmp_path / "out" / "loss.json").read_text())
    ours, theirs = (report["results"][side] for side in ("fastlora", "PEFT"))
    assert numpy.array(ours["loss"]) == pytest.approx(numpy.array(theirs["loss"]), rel=1e-4)
    assert report["results"]["fastlora"]["logits"]["base"] > 1e-3  # the adapter changes the output
    for side in ("MXFP4 experts", "NF4 experts"):
        packed = report["results"][side]
        assert packed["weights_resident"] < 0.8 * theirs["weights_resident"]
        assert numpy.array(packed["loss"]) == pytest.approx(numpy.array(theirs["loss"]), rel=0.01)


def test_a_side_in_8_bits(compared):
    assert "fastlora, int8" in compared.printed
    ours, theirs = (compared.report["results"][side] for side in ("int8", "PEFT"))
    for one, other in zip(ours["held_out_loss"], theirs["held_out_loss"], strict=True):
        assert one[1] == pytest.approx(other[1], rel=0.01)


def test_a_sweep_writes_its_table_picture_and_adapters(inputs, tmp_path):
    model_and_data, out = inputs[:4], tmp_path / "sweep"
    options = ("--steps", "4", "--batch", "2", "--seq-len", "32", "--out", out)
    script = SCRIPT.with_name("sweep.py")
    code, printed, errors = finetune(*model_and_data, *options, script=script)
    assert code == 0, errors
    trials = json.loads((out / "sweep.json").read_text())["trials"]
    assert len(trials) == 8
    assert f"are in {out}" in printed
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    peft = pytest.importorskip("peft")
    assert peft.PeftConfig.from_pretrained(out / "best").r in (2, 8, 32, 128)


def test_bad_input_is_one_line_and_writes_nothing(tmp_path):
    for option in (["--data", "missing.txt"], ["--rank", "0"], ["--quantized", "--experts"]):
        code, printed, errors = finetune(*option, "--out", tmp_path / "out")
        assert (code, printed, len(errors.splitlines())) == (2, "", 1)
        assert option[0] in errors or option[1] in errors
    assert not (tmp_path / "out").exists()
