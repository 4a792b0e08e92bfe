"""Run a project's LoRA tests without fastlora and with it, and compare the outcomes.

    python -m tools.suites.run peft --quick
    python -m tools.suites.run trl ../trl

All fetched or written files are in .cache/suites.
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

from . import compare, source
from .compare import Outcome
from .source import Package
from .suite import SUITES, Suite

TOOLS = Path(__file__).resolve().parent.parent
CACHE = TOOLS.parent / ".cache" / "suites"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make suites", description=__doc__)
    parser.add_argument("suite", choices=SUITES, help="the project")
    parser.add_argument(
        "source",
        nargs="?",
        type=Path,
        metavar="PATH",
        help="a checkout of the project; without it, PyPI's source of PEFT is taken",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a third of PEFT's tests, in 3 minutes"
    )
    parser.add_argument(
        "--file", action="append", metavar="NAME", help="only this file (repeat for more files)"
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="only the tests that match, as in pytest")
    parser.add_argument(
        "--version", metavar="X.Y.Z", help="PEFT's, from PyPI; without it, the installed one"
    )
    parser.add_argument(
        "--keep-unpatched",
        action="store_true",
        help="use the unpatched outcomes of the last call, which must have had the same arguments",
    )
    chosen = parser.parse_args(arguments)
    if chosen.suite != "peft" and not chosen.source:
        parser.error(f"{chosen.suite} needs PATH, a checkout of the project")
    return chosen


def hub(name: str, cache: Path, package: Package) -> Path:
    """The folder of tiny models, written again if the code for it has changed."""
    texts = [(TOOLS / "suites" / file).read_bytes() for file in ("hub.py", "models.py")]
    versions = [version("transformers"), version("diffusers"), package.version]
    texts += [text.encode() for text in versions]
    folder = cache / f"hub-{hashlib.sha256(b' '.join(texts)).hexdigest()[:12]}"
    if not folder.is_dir():
        print("Making tiny models …", flush=True)
        for outdated in cache.glob("hub-*"):
            shutil.rmtree(outdated)
        command = [sys.executable, "-m", "suites.hub", name, str(folder)]
        made = subprocess.run(
            command, env=environment(folder, package), capture_output=True, text=True, check=False
        )
        if made.returncode:
            sys.exit(f"{made.stderr}\nThe tiny models could not be made.")
    return folder


def environment(models: Path, package: Package) -> dict[str, str]:
    """Settings: no hub except the tiny models, and one thread, the fastest for these layers."""
    defaults = {"OMP_NUM_THREADS": "1"}
    folders = [TOOLS, package.folder, os.environ.get("PYTHONPATH")]
    fixed = {
        "HF_HOME": str(CACHE / "home"),
        "HF_HUB_CACHE": str(models),
        "HF_HUB_OFFLINE": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # without it, test_torch_compile.py skips itself
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, folders))),
        "TOKENIZERS_PARALLELISM": "false",
    }
    inherited = {k: v for k, v in os.environ.items() if k != "FASTLORA_DISABLE"}
    return defaults | inherited | fixed


def run_tests(
    side: str, options: list[str], folder: Path, models: Path, package: Package
) -> dict[str, Outcome]:
    """Run the tests in a separate process, and read their outcomes."""
    outcomes, log = folder.parent / f"{side}.jsonl", folder.parent / f"{side}.log"
    command = [sys.executable, "-m", "pytest", "-p", "suites.plugin", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", "--continue-on-collection-errors"]
    command += ["-c", "pytest.ini", "--rootdir", ".", "--suite-outcomes", str(outcomes), *options]
    print(f"{side} …", end=" ", flush=True)
    start = time.monotonic()
    with log.open("w") as output:
        code = subprocess.run(
            command,
            cwd=folder,
            env=environment(models, package),
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


def chosen_files(arguments: argparse.Namespace, suite: Suite, tests: Path) -> list[str]:
    patterns = arguments.file or (arguments.quick and suite.quick) or suite.files
    patterns = [name if name.endswith(".py") else f"{name}.py" for name in patterns]
    missing = [name for name in patterns if not any(tests.glob(name))]
    if missing and arguments.file:
        sys.exit(f"{suite.title}'s tests have no {missing[0]}; they are in {tests}")
    if missing:
        print(f"Not in this version of {suite.title}:", ", ".join(missing))
    found = (sorted(tests.glob(name)) for name in patterns)
    return [str(path.relative_to(tests.parent)) for paths in found for path in paths]


def unknown_files(suite: Suite, tests: Path) -> list[str]:
    """Files with LoRA tests that the selection neither includes nor excludes."""
    known = {*suite.files, *suite.left_out}
    return [
        path.name
        for path in sorted(tests.glob("test_*.py"))
        if path.name not in known and re.search(r"\bLoraConfig\(", path.read_text())
    ]


def report(title: str, unpatched: dict[str, Outcome], optimized: dict[str, Outcome]) -> int:
    """Print the comparison.  Returns 0 if tests passed, and no test's outcome differs."""
    print(f"\n{title}\n{compare.table(unpatched, optimized)}")
    print("\nCalls of lora.Linear that ran PEFT's forward:")
    print(compare.own_calls(optimized) or "    none")
    print("\nFailed in both (most need files or packages that aren't installed):")
    print(compare.failed_in_both(unpatched, optimized) or "    none")
    found = compare.differences(unpatched, optimized)
    print("\nDifferences:", len(found) or "none")
    print(*found, sep="\n")
    passed = any(outcome.outcome == "passed" for outcome in unpatched.values())
    return 0 if passed and not found else 1


def main() -> int:
    arguments = parse(sys.argv[1:])
    suite, cache = SUITES[arguments.suite], CACHE / arguments.suite
    folder = cache / "run"
    cache.mkdir(parents=True, exist_ok=True)
    if suite.package:
        checkout = arguments.source
        package = Package(source.version_of(suite, checkout), folder / suite.package)
    else:
        chosen = arguments.version
        package = source.install_peft(chosen, cache) if chosen else source.installed_peft()
        checkout = arguments.source or source.download_peft(package, cache)
        found = source.version_of(suite, checkout)
        if found != package.version:
            print(f"Note: PEFT {found}'s tests run with PEFT {package.version}.")
    source.prepare(suite, checkout, folder)
    models = hub(arguments.suite, cache, package)
    options = ["--suite", arguments.suite, *chosen_files(arguments, suite, folder / "tests")]
    options += ["-k", arguments.k] if arguments.k else []
    if arguments.keep_unpatched and (cache / "unpatched.jsonl").is_file():
        unpatched = compare.read(cache / "unpatched.jsonl")
    else:
        unpatched = run_tests("unpatched", options, folder, models, package)
    optimized = run_tests("optimized", ["--suite-optimize", *options], folder, models, package)
    code = report(f"{suite.title} {package.version}", unpatched, optimized)
    if suite.left_out and not (arguments.quick or arguments.file):
        print("\nFiles and tests left out:")
        for name, reason in suite.left_out.items():
            print(f"    {name}: {reason}")
        for name in unknown_files(suite, folder / "tests"):
            print(f"    {name}: not classified yet, may have LoRA tests (selection.py)")
    return code


if __name__ == "__main__":
    sys.exit(main())
