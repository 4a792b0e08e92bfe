"""Run PEFT's LoRA tests without fastlora and with it, and compare the outcomes.

    python -m tools.peft_suite.run --quick

All fetched or written files are in .cache/peft-suite.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from . import compare, selection, source
from .compare import Outcome
from .source import Peft

TOOLS = Path(__file__).resolve().parent.parent
CACHE = TOOLS.parent / ".cache" / "peft-suite"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make peft-suite", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the tests, in 3 minutes")
    parser.add_argument(
        "--file", action="append", metavar="NAME", help="only this file (repeat for more files)"
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="only the tests that match, as in pytest")
    parser.add_argument(
        "--version", metavar="X.Y.Z", help="PEFT's, from PyPI; without it, the installed one"
    )
    parser.add_argument(
        "--source", type=Path, metavar="PATH", help="PEFT's source; without it, PyPI's is taken"
    )
    parser.add_argument(
        "--keep-unpatched",
        action="store_true",
        help="use the unpatched outcomes of the last call, which must have had the same arguments",
    )
    return parser.parse_args(arguments)


def hub(peft: Peft) -> Path:
    """The folder of tiny models, written again if the code for it has changed."""
    texts = [(TOOLS / "peft_suite" / name).read_bytes() for name in ("hub.py", "models.py")]
    versions = [version("transformers"), version("diffusers"), peft.version]
    texts += [text.encode() for text in versions]
    folder = CACHE / f"hub-{hashlib.sha256(b' '.join(texts)).hexdigest()[:12]}"
    if not folder.is_dir():
        print("Making tiny models …", flush=True)
        for outdated in CACHE.glob("hub-*"):
            shutil.rmtree(outdated)
        command = [sys.executable, "-m", "peft_suite.hub", str(folder)]
        made = subprocess.run(
            command, env=environment(folder, peft), capture_output=True, text=True, check=False
        )
        if made.returncode:
            sys.exit(f"{made.stderr}\nThe tiny models could not be made.")
    return folder


def environment(models: Path, peft: Peft) -> dict[str, str]:
    """Settings: no hub except the tiny models, and one thread, the fastest for these layers."""
    defaults = {"OMP_NUM_THREADS": "1"}
    fixed = {
        "HF_HOME": str(CACHE / "home"),
        "HF_HUB_CACHE": str(models),
        "HF_HUB_OFFLINE": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # without it, test_torch_compile.py skips itself
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, [TOOLS, peft.folder]))),
        "TOKENIZERS_PARALLELISM": "false",
    }
    inherited = {k: v for k, v in os.environ.items() if k != "FASTLORA_DISABLE"}
    return defaults | inherited | fixed


def run_tests(
    name: str, options: list[str], folder: Path, models: Path, peft: Peft
) -> dict[str, Outcome]:
    """Run PEFT's tests in a separate process, and read their outcomes."""
    outcomes, log = CACHE / f"{name}.jsonl", CACHE / f"{name}.log"
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite.plugin", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", "--continue-on-collection-errors"]
    command += ["-c", "pytest.ini", "--rootdir", ".", "--suite-outcomes", str(outcomes), *options]
    print(f"{name} …", end=" ", flush=True)
    start = time.monotonic()
    with log.open("w") as output:
        code = subprocess.run(
            command,
            cwd=folder,
            env=environment(models, peft),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    if code == 5:
        sys.exit("No LoRA test of these files matches: change -k or --file")
    if code not in (0, 1):  # all passed, some failed
        lines = log.read_text().strip().splitlines()[-10:]
        print(*lines, f"pytest ended with {code}; its output is in {log}", sep="\n")
    if code > 1:
        sys.exit(1)
    return compare.read(outcomes)  # after a crash (code < 0), of the tests before it


def chosen_files(arguments: argparse.Namespace, tests: Path) -> list[str]:
    names = arguments.file or (selection.QUICK if arguments.quick else selection.FILES)
    names = [name if name.endswith(".py") else f"{name}.py" for name in names]
    missing = [name for name in names if not (tests / name).is_file()]
    if missing and arguments.file:
        sys.exit(f"PEFT's tests have no {missing[0]}; they are in {tests}")
    if missing:
        print("Not in this version of PEFT:", ", ".join(missing))
    return [f"tests/{name}" for name in names if name not in missing]


def unknown_files(tests: Path) -> list[str]:
    """Files with LoRA tests that the selection neither includes nor excludes."""
    known = {*selection.FILES, *selection.LEFT_OUT}
    return [
        path.name
        for path in sorted(tests.glob("test_*.py"))
        if path.name not in known and re.search(r"\bLoraConfig\(", path.read_text())
    ]


def report(peft: Peft, unpatched: dict[str, Outcome], optimized: dict[str, Outcome]) -> int:
    """Print the comparison.  Returns 0 if no test's outcome differs."""
    print(f"\nPEFT {peft.version}\n{compare.table(unpatched, optimized)}")
    print("\nCalls of lora.Linear that ran PEFT's forward:")
    print(compare.own_calls(optimized) or "    none")
    print("\nFailed in both (most need files or packages that aren't installed):")
    print(compare.failed_in_both(unpatched, optimized) or "    none")
    found = compare.differences(unpatched, optimized)
    print("\nDifferences:", len(found) or "none")
    print(*found, sep="\n")
    return 1 if found else 0


def main() -> int:
    arguments = parse(sys.argv[1:])
    CACHE.mkdir(parents=True, exist_ok=True)
    peft = source.install(arguments.version, CACHE) if arguments.version else source.installed()
    tests = arguments.source or source.download(peft, CACHE)
    source.check(tests, peft)
    folder = CACHE / "run"
    source.prepare(tests, folder)
    models = hub(peft)
    options = chosen_files(arguments, folder / "tests")
    options += ["-k", arguments.k] if arguments.k else []
    if arguments.keep_unpatched and (CACHE / "unpatched.jsonl").is_file():
        unpatched = compare.read(CACHE / "unpatched.jsonl")
    else:
        unpatched = run_tests("unpatched", options, folder, models, peft)
    optimized = run_tests("optimized", ["--suite-optimize", *options], folder, models, peft)
    code = report(peft, unpatched, optimized)
    if not (arguments.quick or arguments.file):
        print("\nFiles and tests left out:")
        for name, reason in (selection.LEFT_OUT | selection.TESTS_LEFT_OUT).items():
            print(f"    {name}: {reason}")
        for name in unknown_files(folder / "tests"):
            print(f"    {name}: not classified yet, may have LoRA tests (selection.py)")
    return code


if __name__ == "__main__":
    sys.exit(main())
