"""Runs examples/sft.py, sample.py, grpo.py, several.py, diffusion.py and start.ipynb to the end.

They need the extra ``recipes``: ``make recipes`` runs them.
"""

import json
import math
import pydoc_data.topics
import re
import runpy
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import randomize
from pages import save_tiny_model
from process import run_python, run_together
from safetensors.torch import load_file

import fastlora

trl = pytest.importorskip("trl", reason="the recipes use TRL")
diffusers = pytest.importorskip("diffusers", reason="a recipe uses diffusers")
datasets = pytest.importorskip("datasets", reason="the recipes use datasets")

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "\n".join([*pydoc_data.topics.topics.values()][:20])[:30_000]
CHATML = """
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' -%}
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ message.content }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a Llama of two layers, its tokenizer, and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(folder)
    (model / "chat_template.jinja").write_text(CHATML)
    return model


@pytest.fixture
def recipe(monkeypatch, tmp_path, capsys) -> Callable:
    """Run a recipe in this process; returns its output, and its Trainer if it has one."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    used = []
    train = transformers.Trainer.train
    monkeypatch.setattr(
        transformers.Trainer,
        "train",
        lambda self, *a, **k: used.append(self) or train(self, *a, **k),
    )

    def run(name: str, *arguments: object) -> tuple[str, transformers.Trainer | None]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, used.pop() if used else None

    return run


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# As in the tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct.
SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def test_sft_trains_smollm2_s_chats_resumes_and_samples(recipe, tiny, tmp_path):
    """The loss is on the assistant's words only, although the template has no marks for them."""
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": role, "content": f"{text} {number}"}
        for number in range(2)
        for role, text in (("user", "What is"), ("assistant", "It is"))
    ]
    chats = [turns, [system, *turns], turns[:2]]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    model, out = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(tiny, model)
    (model / "chat_template.jinja").write_text(SMOLLM2)
    start = ["--model", model, "--data", data, "--out", out, "--batch=1"]
    printed, trainer = recipe("sft", *start, "--epochs=1")
    assert "all chats have the same text as before" in printed
    assert "14 of 14 layers fast" in printed
    assert "\nloss without logits: base_model.model.lm_head\n" in printed
    [batch] = trainer.get_train_dataloader()
    decode = trainer.processing_class.decode
    packed, learned = map(decode, (batch["input_ids"][0], batch["labels"][batch["labels"] != -100]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert sorted(packed.partition(text)[1] for text in texts) == sorted(texts)
    assert len(packed) == sum(map(len, texts))
    both = "It is 0<|im_end|>It is 1<|im_end|>"
    assert learned.count("It is") == 5
    assert learned.replace(both, "") == "It is 0<|im_end|>"
    _, trainer = recipe("sft", *start, "--epochs=2")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    ask = ["--adapter", out, "--prompt", "What is 3?", "--tokens=5"]
    said, _ = recipe("sample", *ask, "--gguf", tmp_path / "lora.gguf")
    assert said.strip("\n").count("\n")  # a reply, and a line about the file
    assert (tmp_path / "lora.gguf").read_bytes()[:4] == b"GGUF"


def test_grpo(recipe, tiny, tmp_path, monkeypatch):
    """In TRL's own loop, each step samples from merged layers and trains unmerged ones."""
    calls, run = [], transformers.LlamaModel.forward

    def noted(decoder: torch.nn.Module, *inputs: object, **named: object) -> object:
        calls.append((torch.is_grad_enabled(), decoder.layers[0].mlp.up_proj.merged))
        return run(decoder, *inputs, **named)

    monkeypatch.setattr(transformers.LlamaModel, "forward", noted)
    arguments = ["--model", tiny, "--steps=2", "--samples=2", "--tokens=6", "--out", tmp_path]
    printed, trainer = recipe("grpo", *arguments)
    assert {grad for grad, _ in calls} == {True, False}
    assert all(merged != grad for grad, merged in calls)
    assert "14 layers; merging takes" in printed
    assert "without logits" not in printed
    steps = json.loads((tmp_path / "rewards.json").read_text())
    assert [steps[0].keys(), len(steps)] == [{"loss", "reward", "step_time"}, 2]
    assert all(math.isfinite(step["loss"]) and 0 < step["reward"] < 2 for step in steps)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    for name, weight in base.state_dict().items():
        now = trainer.model.get_base_model().state_dict()
        place = name if name in now else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(now[place], weight), name
    peft.PeftModel.from_pretrained(base, tmp_path)


RUN = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def in_two(tiny, tmp_path_factory) -> Callable:
    folder = tmp_path_factory.mktemp("several")
    (folder / "text.txt").write_text(TEXT[:6000])

    def run(name: str, *flags: str) -> tuple[list[str], dict[str, torch.Tensor]]:
        sizes = "--steps=3", "--batch=2", "--length=16", "--data", folder / "text.txt"
        out = ("--model", tiny, "--out", folder / name, *sizes, *flags)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        group["WORLD_SIZE"] = "2"
        ranks = [group | {"RANK": each, "LOCAL_RANK": each} for each in "01"]
        printed, _ = run_together(RUN, ranks, EXAMPLES / "several.py", *out)
        return printed.splitlines(), adapter(folder / name)

    return run


def test_several_sharded_and_replicated_train_the_same_adapter(in_two):
    lines, sharded = in_two("fsdp2")
    assert lines[0] == "14 of 14 layers fast (backend torch)"
    assert [line[:6] for line in lines if line.startswith("step")] == ["step 1", "step 2", "step 3"]
    assert not any("left out" in line or "each rank" in line for line in lines)
    replicated = in_two("ddp", "--ddp")[1]
    assert sharded.keys() == replicated.keys()
    assert len(sharded) == 28
    for name, tensor in sharded.items():
        torch.testing.assert_close(tensor, replicated[name], rtol=1e-3, atol=1e-5)


def test_diffusion_and_diffusers_load_what_it_wrote(recipe, tmp_path, monkeypatch):
    trained = []
    optimize = fastlora.optimize
    monkeypatch.setattr(fastlora, "optimize", lambda m: trained.append(m) or optimize(m))
    printed, _ = recipe("diffusion", "--steps=3", "--batch=2", "--out", tmp_path)
    assert "15 of 15 layers fast" in printed
    (model,) = trained
    fresh = diffusers.FluxTransformer2DModel(**model.config)
    plain = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items()}
    fresh.load_state_dict({name: t for name, t in plain.items() if "lora_" not in name})
    batch = DIFFUSION["flux"][2]
    with torch.no_grad():
        expected, without = model(**batch).sample, fresh(**batch).sample
        fresh.load_lora_adapter(tmp_path, prefix="transformer", use_safetensors=True)
        found = fresh(**batch).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without, expected, rtol=1e-4, atol=1e-5)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


HEADS = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
JOINT = HEADS | {"joint_attention_dim": 32}
TEXTS, TIME = {"encoder_hidden_states": draw(2, 5, 32)}, {"timestep": torch.tensor([0.3, 0.7])}
POOLED, ROPE = {"pooled_projections": draw(2, 32)}, {"axes_dims_rope": (4, 6, 6)}
IDS = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
TO = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
DIFFUSION = {
    "flux": (
        "FluxTransformer2DModel",
        JOINT | ROPE | {"in_channels": 16, "num_single_layers": 1, "pooled_projection_dim": 32},
        TEXTS | TIME | POOLED | IDS | {"hidden_states": draw(2, 16, 16)},
    ),
    "unet": (
        "UNet2DConditionModel",
        {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8}
        | {"norm_num_groups": 4, "cross_attention_dim": 32, "attention_head_dim": 8}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        TEXTS | TIME | {"sample": draw(2, 4, 8, 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_diffusion_model_has_peft_s_numbers(name):
    kind, sizes, batch = DIFFUSION[name]
    model = getattr(diffusers, kind)(**sizes).train()
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TO))
    randomize(model, 0.1)
    report = fastlora.coverage(fastlora.optimize(model, strict=True))
    assert len(report.layers) >= 6
    assert fastlora.check(model, batch), fastlora.check(model, batch)


def test_the_notebook_runs(tiny, tmp_path):
    """Top to bottom in a clone's examples/, but for the installation and the download."""
    notebook = json.loads((EXAMPLES / "start.ipynb").read_text())
    cells = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    lines = [line for cell in cells for line in [*cell, "\n"]]
    code = "".join(line for line in lines if not line.startswith("%"))
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    shutil.copytree(EXAMPLES.parent / "kernels", tmp_path / "kernels")
    shutil.copytree(tiny, tmp_path / ".cache" / "models" / "SmolLM2-135M-Instruct")
    code = code.replace("60_000", "6_000") + "\nimport importlib.util as util\n"
    code += "print('kernels:', (spec := util.find_spec('kernels')) and spec.origin)\n"
    printed = run_python("-c", code, cwd=tmp_path / "examples", CUDA_VISIBLE_DEVICES="")
    assert printed.startswith("14 of 14 layers fast")  # and no tree of the whole model
    steps = re.findall(r"PEFT loss (\S+), \S+ s   fastlora loss (\S+), \S+ s", printed)
    assert len(steps) == 8
    for theirs, ours in steps:
        assert float(ours) == pytest.approx(float(theirs), rel=0.05)
    assert "the same within rounding" in printed
    assert f"kernels: {tmp_path}" not in printed  # Hugging Face's, or none
    assert (tmp_path / "out" / "start" / "adapter_model.safetensors").exists()
