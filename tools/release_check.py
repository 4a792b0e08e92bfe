"""Build a release, sdist and wheel, and check that the wheel works in an empty environment.

    python -m tools.release_check               # builds into dist/, then checks
    python -m tools.release_check --built       # checks the files in dist/
    python -m tools.release_check --no-machine  # without `make machine`, which takes hours

The checks run outside of the clone, in .cache/release/venv.  pip installs only the wheel there,
first without and then with extras.  Each check prints a line with its time; the first failure ends
the run.  ``python -I release_check.py NAME`` runs one of STEPS there.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER, DIST = ROOT / ".cache" / "release", ROOT / "dist"


def bare() -> None:
    """Without extras, every public name exists, and errors name the extra that is missing."""
    import torch

    import fastlora

    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert all(getattr(fastlora, name) is not None for name in fastlora.__all__)
    for extra, call in {
        "peft": lambda: fastlora.optimize(model),
        "gguf": lambda: fastlora.export_gguf("a", "b", model_config="c"),
        "quantized": lambda: fastlora.pack(model, "nf4", modules=["0"]),
        "trainer": lambda: __import__("fastlora.trainer"),
    }.items():
        try:
            call()
        except (ImportError, ValueError) as error:
            said = str(error)
        else:
            said = "nothing"
        assert f"pip install 'fastlora-kernels[{extra}]'" in said, said


def readme() -> None:
    """Run README's blocks in order, with tiny random models."""
    from cell import BATCH, llama, peft_model
    from pages import README, blocks_of, save_tiny_model

    save_tiny_model(Path.cwd())
    for code in blocks_of(README, "python"):
        exec(code, {"batch": BATCH, "model": llama(), "peft_model": peft_model()})


def checks() -> None:
    """The checks of ``make matrix``: the op on both backends, PEFT models, files, Trainer, …"""
    from cell import CHECKS, outcome

    found = {name: outcome(each) for name, each in CHECKS.items()}
    assert not any("error" in how for how in found.values()), found


STEPS = {step.__name__: step for step in (bare, readme, checks)}


def check(what: str, *command: str | Path, cwd: Path = FOLDER) -> str:
    """Run a command, print its line, and return its output.  A failure ends the run."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own, start = own | {"HF_HUB_OFFLINE": "1"}, time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=False)
    took = f"{time.monotonic() - start:5.1f} s"
    if done.returncode:
        sys.exit(
            f"{took}  FAILED  {what}: {done.stdout}{done.stderr}$ {' '.join(map(str, command))}"
        )
    print(f"{took}  ok  {what}", flush=True)
    return done.stdout


def build() -> None:
    """Build both files from a copy of the tree; dist/ changes only after their checks."""
    from tools.matrix.clone import copy_of_clone  # late: a step's environment doesn't have it

    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        source, out = copy_of_clone(Path(scratch, "source")), Path(scratch, "dist")
        check("sdist and wheel", sys.executable, "-m", "build", "-n", "-o", out, source)
        check("twine", sys.executable, "-m", "twine", "check", "--strict", *out.iterdir())
        shutil.rmtree(DIST, ignore_errors=True)
        out.rename(DIST)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--built", action="store_true", help="check the files in dist/")
    parser.add_argument(
        "--no-machine", action="store_true", help="leave `make machine` and `make prove` out"
    )
    asked, start = parser.parse_args(), time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not asked.built:
        build()
    (wheel,) = DIST.glob("*.whl")
    venv.create(FOLDER / "venv", clear=True, with_pip=True)
    python = FOLDER / "venv" / "bin" / "python"
    (extras,) = set(re.findall(r"pip install -e '\.(\[.+?\])'", (ROOT / "README.md").read_text()))
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        place = Path(scratch)
        check(f"pip install {wheel.name}", *pip, wheel, cwd=place)
        check("bare", python, "-I", __file__, "bare", cwd=place)
        check(f"pip install {wheel.name}{extras}", *pip, f"{wheel}{extras}", cwd=place)
        for step in list(STEPS)[1:]:
            check(step, python, "-I", __file__, step, cwd=place)
        check("fastlora --version", python.with_name("fastlora"), "--version", cwd=place)
        usage = check("--help", python, "-m", "fastlora", "--help", cwd=place)
        commands = re.findall(r"^    ([a-z-]+) ", usage, re.M)
        assert "doctor" in commands, usage
        for name in commands:
            check(f"{name} --help", python, "-m", "fastlora", name, "--help", cwd=place)
    if not asked.no_machine:
        print(check("proofs of all kernels", "make", "prove", "ARGS=--all", cwd=ROOT), end="")
        words = "ARGS=--misses --save"
        print(check("every case on every card", "make", "machine", words, cwd=ROOT), end="")
    print(f"{time.monotonic() - start:5.1f} s  all of {wheel.name}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STEPS:
        sys.path += map(str, (ROOT / "tests" / "support", ROOT / "tools" / "matrix"))
        STEPS[sys.argv[1]]()
    else:
        main()
