"""examples/finetune.py, run as a user runs it, on a tiny Llama and a text made here."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
WORDS = ["a", "layer", "keeps", "its", "weight", "and", "bias", "while", "the", "adapter", "learns"]
TEXT = " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(3000))
FAST = (
    "--steps",
    "6",
    "--batch",
    "2",
    "--seq-len",
    "32",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--lr",
    "0.01",
)
TEMPORARY = (".finetune-*", ".fastlora-*", "*.tmp", "*.partial")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a random Llama of two layers, with a tokenizer of words."""
    transformers = pytest.importorskip("transformers", reason="the example uses transformers")
    for package in ("accelerate", "matplotlib", "peft", "tqdm"):
        pytest.importorskip(package, reason=f"the example uses {package}")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *sorted(set(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(vocabulary),
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def compared(model, text, tmp_path_factory):
    """One run of all three sides, without dropout: the process, and the folder of its results."""
    out = tmp_path_factory.mktemp("compared") / "out"
    arguments = ["--model", model, "--data", text, "--out", out, "--dropout", "0", "--optimize"]
    process = finetune(*arguments, *FAST)
    assert process.returncode == 0, process.stderr
    return process, out


def environment():
    # One thread: the tiny model gains nothing from more, and other tests may run beside it.
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def finetune(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(
        [str(part) for part in command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def temporary_files(folder):
    return [path for pattern in TEMPORARY for path in folder.rglob(pattern)]


def test_results_are_written_whole(compared):
    _, out = compared
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {
        "loss.png",
        "loss.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "checkpoints/fastlora/checkpoint-6/adapter_model.safetensors",
        "checkpoints/PEFT/checkpoint-6/adapter_model.safetensors",
        "checkpoints/optimized/checkpoint-6/adapter_model.safetensors",
    } <= files
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert temporary_files(out) == []


@pytest.mark.parametrize("side", ["fastlora", "optimized"])
def test_losses_fall_and_follow_peft(compared, side):
    _, out = compared
    results = json.loads((out / "loss.json").read_text())["results"]
    ours, theirs = results[side], results["PEFT"]
    for curve in ("loss", "held_out_loss"):
        assert [step for step, _ in ours[curve]] == [step for step, _ in theirs[curve]]
        for (_, our_loss), (_, their_loss) in zip(ours[curve], theirs[curve], strict=True):
            assert math.isfinite(our_loss)
            assert our_loss == pytest.approx(their_loss, rel=1e-3)
    assert ours["held_out_loss"][0][0] == 0
    assert ours["held_out_loss"][-1][0] == 6
    assert ours["held_out_loss"][-1][1] < ours["held_out_loss"][0][1] - 0.05


def test_table_has_all_sides(compared):
    process, out = compared
    results = json.loads((out / "loss.json").read_text())["results"]
    assert "fastlora        PEFT   optimized   over PEFT   over PEFT" in process.stdout
    assert process.stdout.count("layers fast (backend torch)") == 2  # fastlora's and the optimised
    for side in results.values():
        assert side["trainable_parameters"] == results["fastlora"]["trainable_parameters"]
        assert f"{side['tokens_per_second']:.1f}" in process.stdout
        assert f"{side['kept_for_backward'] / 2**20:.0f}" in process.stdout
    assert results["fastlora"]["kept_for_backward"] <= results["PEFT"]["kept_for_backward"]


def test_peft_loads_the_adapter(compared, model):
    import peft
    import transformers

    _, out = compared
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.arange(12)[None]
    plain = base(tokens).logits
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter").eval()(tokens).logits
    assert (adapted - plain).abs().max() > 0.01


def test_jsonl_and_all_linear_without_peft(model, tmp_path):
    data, out = tmp_path / "text.jsonl", tmp_path / "out"
    data.write_text(
        "".join(json.dumps({"text": TEXT[i : i + 4000]}) + "\n" for i in range(0, 12000, 4000))
    )
    process = finetune(
        "--model",
        model,
        "--data",
        data,
        "--out",
        out,
        "--target",
        "all-linear",
        "--no-compare",
        *FAST,
    )
    assert process.returncode == 0, process.stderr
    assert list(json.loads((out / "loss.json").read_text())["results"]) == ["fastlora"]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert "down_proj" in config["target_modules"]
    assert not (out / "checkpoints" / "PEFT").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--data", "missing.txt"], "missing.txt: there is no such file", id="no-data"),
        pytest.param(["--data", "other.jsonl"], "line 2: each line must be", id="no-text"),
        pytest.param(["--data", "broken.jsonl"], "line 1: no JSON", id="no-json"),
        pytest.param(["--data", "binary.txt"], "not UTF-8", id="binary-data"),
        pytest.param(["--data", "empty.txt"], "the file is empty", id="empty-data"),
        pytest.param(["--rank", "0"], "'0' is no whole number of at least 1", id="rank-0"),
        pytest.param(["--dropout", "1"], "'1' is no number from 0 to below 1", id="dropout-1"),
        pytest.param(["--lr", "nan"], "--lr: 'nan' is no number", id="lr-nan"),
        pytest.param(["--dtype", "int8"], "--dtype: invalid choice: 'int8'", id="dtype-int8"),
        pytest.param(["--target", "q_proj,,v_proj"], "--target", id="target-empty"),
        pytest.param(["--model", "./no/such/folder"], "no such folder", id="no-model"),
        pytest.param(["--model", "."], "the folder has no config.json", id="no-config"),
        pytest.param(["--out", "binary.txt"], "--out", id="out-is-a-file"),
        pytest.param(["--optimize"], "--no-compare leaves PEFT out", id="optimize-nothing"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "broken.jsonl").write_text("text\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    process = finetune("--no-compare", *arguments)
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert message in process.stderr
    assert process.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_target_lists_what_there_is(model, text, tmp_path):
    out = tmp_path / "out"
    process = finetune("--model", model, "--data", text, "--out", out, "--target", "nothing", *FAST)
    assert process.returncode == 2
    assert "q_proj (2)" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert list(out.iterdir()) == []


def test_ctrl_c_leaves_nothing_half_written(model, text, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", model, "--data", text, "--out", out, *FAST, "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while "training with fastlora" not in (line := process.stderr.read(200)):
        assert line, f"it ended by itself, with {process.wait()}"
    assert temporary_files(out) != []  # so that the pattern can fail below
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the children too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "interrupted: nothing half-written is left"
    assert "Traceback" not in error
    assert list(out.iterdir()) == []
