"""examples/finetune.py, run as a user runs it, on a tiny Llama and a text made here."""

import importlib
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from itertools import chain, pairwise
from pathlib import Path

import numpy
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
WORDS = ["a", "layer", "keeps", "its", "weight", "and", "bias", "while", "the", "adapter", "learns"]
TEXT = " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(3000))
FAST = (
    *("--steps", "6", "--batch", "2", "--seq-len", "32", "--lr", "0.01"),
    *("--dtype", "float32", "--device", "cpu"),
)
NO_16_BIT_PRODUCTS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # on x86
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
    """One run of all three sides, without dropout: what it printed, the folder of its results, and
    how many processes of sides lived when it printed a line."""
    out = tmp_path_factory.mktemp("compared") / "out"
    arguments = ["--model", model, "--data", text, "--out", out, "--dropout", "0", "--optimize"]
    errors, lines, living = out.with_name("errors"), [], {}
    with errors.open("w") as file:
        process = subprocess.Popen(
            command(*arguments, *FAST),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
        for line in process.stdout:
            lines.append(line)
            living[line.strip()] = len(side_processes(process))
    assert process.wait() == 0, errors.read_text()
    return "".join(lines), out, living


def command(*arguments):
    return [str(part) for part in (sys.executable, SCRIPT, *arguments)]


def environment(**more):
    # One thread: the tiny model gains nothing from more, and other tests may run beside it.
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


def finetune(*arguments, more=(), **settings):
    return subprocess.run(
        command(*arguments),
        env=environment(**dict(more)),
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    )


def start_training(*arguments):
    """Start it, and wait until it trains."""
    process = subprocess.Popen(
        command(*arguments, *FAST, "--steps", "100000"),
        env=environment(),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while "training with fastlora" not in (line := process.stderr.read(200)):
        assert line, f"it ended by itself, with {process.wait()}"
    time.sleep(0.5)
    return process


def children(process):
    psutil = pytest.importorskip("psutil", reason="accelerate brings it")
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


def side_processes(process):
    """The processes of the sides, which finetune.py's own child makes."""
    return list(chain.from_iterable(child.children() for child in children(process)))


def ended(processes):
    """Whether all end within ten seconds."""
    deadline = time.monotonic() + 10
    while any(each.is_running() for each in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(each.is_running() for each in processes)


def temporary_files(folder):
    return [path for pattern in TEMPORARY for path in folder.rglob(pattern)]


def test_results_are_written_whole(compared):
    _, out, _ = compared
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
    _, out, _ = compared
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
    printed, out, _ = compared
    results = json.loads((out / "loss.json").read_text())["results"]
    assert "fastlora        PEFT   optimized   over PEFT   over PEFT" in printed
    assert printed.count("layers fast (backend torch)") == 2  # fastlora's and the optimised
    for side in results.values():
        assert side["trainable_parameters"] == results["fastlora"]["trainable_parameters"]
        assert f"{side['tokens_per_second']:.1f}" in printed
        assert f"{side['kept_for_backward'] / 2**20:.0f}" in printed
    assert results["fastlora"]["kept_for_backward"] <= results["PEFT"]["kept_for_backward"]


def test_sides_train_in_turn(compared):
    _, out, _ = compared
    results = json.loads((out / "loss.json").read_text())["results"]
    steps = sorted(
        (began, began + seconds, step, side)
        for side, result in results.items()
        for step, (began, seconds) in enumerate(
            zip(result["step_began"], result["seconds_per_step"], strict=True)
        )
    )
    for (_, end, *_), (begin, *_) in pairwise(steps):
        assert end <= begin
    a, b, c = "fastlora", "PEFT", "optimized"
    order = [a, b, c, b, c, a, c, a, b]  # who goes first changes
    assert [side for *_, side in steps] == 2 * order
    assert [step for *_, step, _ in steps] == [step for step in range(6) for _ in "abc"]


def test_step_time_is_compared_in_pairs(compared):
    printed, out, _ = compared
    report = json.loads((out / "loss.json").read_text())
    seconds = {side: result["seconds_per_step"] for side, result in report["results"].items()}
    assert list(report["step_time_over_peft"]) == ["fastlora", "optimized"]
    for side, ratio in report["step_time_over_peft"].items():
        pairs = numpy.array(seconds[side]) / numpy.array(seconds["PEFT"])
        low, middle, high = numpy.percentile(pairs, [25, 50, 75])
        assert ratio["pairs"] == pytest.approx(pairs)
        assert ratio["median"] == pytest.approx(middle)
        assert ratio["quartiles"] == pytest.approx([low, high])
        assert f"a step takes {middle:.3f} of PEFT's time (median of 6 pairs" in printed
        assert f"quartiles {low:.3f} and {high:.3f}" in printed


def test_memory_is_measured_alone(compared):
    _, out, living = compared
    assert living["--- optimized: loading the model"] >= 2  # those before it
    for side in json.loads((out / "loss.json").read_text())["results"]:
        assert living[f"measuring the memory that {side} needs, alone"] <= 1  # its own


def test_picture_is_drawn_from_the_results(compared, tmp_path):
    _, out, _ = compared
    command = [sys.executable, SCRIPT.with_name("plot.py"), out / "loss.json", tmp_path / "a.png"]
    subprocess.run(list(map(str, command)), check=True)
    assert (tmp_path / "a.png").read_bytes() == (out / "loss.png").read_bytes()


def test_peft_loads_the_adapter(compared, model):
    import peft
    import transformers

    _, out, _ = compared
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.arange(12)[None]
    plain = base(tokens).logits
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter").eval()(tokens).logits
    assert (adapted - plain).abs().max() > 0.01


def test_jsonl_all_linear_and_auto_dtype_without_peft(model, tmp_path):
    data, out = tmp_path / "text.jsonl", tmp_path / "out"
    data.write_text(
        "".join(json.dumps({"text": TEXT[i : i + 4000]}) + "\n" for i in range(0, 12000, 4000))
    )
    arguments = ["--model", model, "--data", data, "--out", out, "--target", "all-linear"]
    process = finetune(
        *arguments, "--no-compare", *FAST, "--dtype", "auto", more=NO_16_BIT_PRODUCTS
    )
    assert process.returncode == 0, process.stderr
    report = json.loads((out / "loss.json").read_text())
    assert list(report["results"]) == ["fastlora"]
    assert report["step_time_over_peft"] == {}
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert "down_proj" in config["target_modules"]
    assert not (out / "checkpoints" / "PEFT").exists()
    choice = report["dtype_choice"]
    assert choice["asked"] == "auto"
    assert f"{choice['dtype']} on cpu: {choice['why']}" in process.stdout.splitlines()
    assert f"{choice['bfloat16_over_float32']:.1f}" in choice["why"]
    assert report["settings"]["dtype"] == choice["dtype"]
    if platform.machine() == "x86_64":
        assert choice["dtype"] == "float32"
    assert report["machine"]["threads"] == 1
    assert report["machine"]["versions"]["torch"] == torch.__version__


def test_bfloat16_trains(model, text, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", model, "--data", text, "--out", out, "--no-compare"]
    process = finetune(*arguments, *FAST, "--dtype", "bfloat16", "--steps", "9")
    assert process.returncode == 0, process.stderr
    result = json.loads((out / "loss.json").read_text())["results"]["fastlora"]
    assert all(math.isfinite(loss) for _, loss in result["loss"])
    assert len(result["seconds_per_step"]) == 9
    assert [step for step, _ in result["held_out_loss"]] == [0, 2, 4, 6, 8, 9]


@pytest.mark.parametrize(
    ("asked", "ratio", "dtype"),
    [
        ("auto", 1.2, "bfloat16"),
        ("auto", 40.0, "float32"),
        ("bfloat16", 40.0, "bfloat16"),
        ("float16", 40.0, "float16"),
    ],
)
def test_auto_dtype_follows_the_measurement(asked, ratio, dtype, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    machine = importlib.import_module("machine")
    monkeypatch.setattr(machine, "bfloat16_over_float32", lambda: ratio)
    assert machine.choose_dtype(asked, "cpu")["dtype"] == dtype


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
    process = start_training("--model", model, "--data", text, "--out", out)
    assert temporary_files(out) != []  # so that the pattern can fail below
    sides = side_processes(process)
    assert len(sides) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the children too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "interrupted: nothing half-written is left"
    assert "Traceback" not in error
    assert list(out.iterdir()) == []
    assert ended(sides)


def test_ctrl_c_while_it_loads(model, text, tmp_path):
    process = subprocess.Popen(
        command("--model", model, "--data", text, "--out", tmp_path / "out", *FAST),
        env=environment(),
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not children(process):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "\ninterrupted: nothing half-written is left\n"
    assert not (tmp_path / "out").exists()


def test_side_that_dies_ends_all(model, text, tmp_path):
    out = tmp_path / "out"
    process = start_training("--model", model, "--data", text, "--out", out)
    sides = side_processes(process)
    sides[-1].kill()  # as the system does when memory runs out
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "PEFT ended with signal SIGKILL, as if memory ran out" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert list(out.iterdir()) == []
    assert ended(sides)


def test_sides_end_after_a_kill(model, text, tmp_path):
    process = start_training("--model", model, "--data", text, "--out", tmp_path / "out")
    sides = side_processes(process)
    process.kill()
    process.communicate(timeout=60)
    assert ended(sides)


def test_full_disk_is_told(model, text, tmp_path):
    out = tmp_path / "out"
    limit = 50_000  # bytes a file: the adapter is larger
    process = finetune(
        *["--model", model, "--data", text, "--out", out, *FAST],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 1
    assert "File too large" in process.stderr
    assert "fastlora ended with exit code 1" in process.stderr.splitlines()[-1]
    assert list(out.iterdir()) == []
