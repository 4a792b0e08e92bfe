"""What a release is: sdist and wheel, and that the wheel works in an empty environment.

    python -m tools.release_check            # builds into dist/, then checks
    python -m tools.release_check --built    # checks what is in dist/

The checks run outside of the clone, in .cache/release/venv, where pip installed nothing but the
wheel, first alone and then with the extras that README names.  Each is a line with its time; the
first that fails ends the run.  ``python -I release_check.py NAME`` is how one of STEPS runs there.
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
    """Without an extra every public name is there, and what needs one says which."""
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
    """Its blocks, in order, on models made from a config."""
    from cell import BATCH, llama, peft_model
    from pages import README, blocks_of

    for code in blocks_of(README, "python"):
        exec(code, {"batch": BATCH, "model": llama(), "peft_model": peft_model()})


def checks() -> None:
    """Those of ``make matrix``: the op on both backends, PEFT models, files, Trainer and more."""
    from cell import CHECKS, outcome

    found = {name: outcome(each) for name, each in CHECKS.items()}
    assert not any("error" in how for how in found.values()), found


STEPS = {step.__name__: step for step in (bare, readme, checks)}


def check(what: str, *command: str | Path, cwd: Path = FOLDER) -> str:
    """Run a command and print its line; what it printed.  A failure ends everything."""
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
    """Both files, from a copy of the tree; dist/ changes once they are whole and right."""
    from tools.matrix.clone import copy_of_clone  # which the environment of a step hasn't

    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        source, out = copy_of_clone(Path(scratch, "source")), Path(scratch, "dist")
        check("sdist and wheel", sys.executable, "-m", "build", "-n", "-o", out, source)
        check("twine", sys.executable, "-m", "twine", "check", "--strict", *out.iterdir())
        shutil.rmtree(DIST, ignore_errors=True)
        out.rename(DIST)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--built", action="store_true", help="check what is in dist/")
    is_built, start = parser.parse_args().built, time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not is_built:
        build()
    (wheel,) = DIST.glob("*.whl")
    venv.create(FOLDER / "venv", clear=True, with_pip=True)
    python = FOLDER / "venv" / "bin" / "python"
    (extras,) = set(re.findall(r"'fastlora-kernels(\[.+?\])'", (ROOT / "README.md").read_text()))
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        place = Path(scratch)
        check(f"pip install {wheel.name}", *pip, wheel, cwd=place)
        check("bare", python, "-I", __file__, "bare", cwd=place)
        check(f"pip install {wheel.name}{extras}", *pip, f"{wheel}{extras}", cwd=place)
        for step in list(STEPS)[1:]:
            check(step, python, "-I", __file__, step, cwd=place)
        usage = check("--help", python, "-m", "fastlora", "--help", cwd=place)
        commands = re.findall(r"^    ([a-z-]+) ", usage, re.M)
        assert "doctor" in commands, usage
        for name in commands:
            check(f"{name} --help", python, "-m", "fastlora", name, "--help", cwd=place)
    print(f"{time.monotonic() - start:5.1f} s  all of {wheel.name}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STEPS:
        sys.path += map(str, (ROOT / "tests" / "support", ROOT / "tools" / "matrix"))
        STEPS[sys.argv[1]]()
    else:
        main()
