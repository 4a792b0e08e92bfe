"""The kernels under every Triton that people have: ``make matrix-triton``.

Each version is installed into ``.cache/`` by itself.  Under it run the tests of what the compiler
makes of the kernels, those of the host's side of launches, and a part of the machine's cases.  The
table goes into ``docs/kernels.md``.  An exit status other than 0 if anything fails.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, MARK = ROOT / "docs" / "kernels.md", "<!-- make matrix-triton -->"
# The version, and the torch that pins it.
VERSIONS = {
    "3.6.0": "2.10, 2.11",
    "3.7.1": "2.13",
    "3.8.0": "2.14",
    "3.9.0": "none; what pip takes",
}
TESTS = ("tests/kernels/test_compile.py", "tests/kernels/test_host.py")
# What a version does to its own plain products as well, and no kernel of ours can mend.
KNOWN = {"3.6.0": "no proxy fence"}


def installed(version: str) -> Path:
    """The folder with this Triton."""
    folder = ROOT / ".cache" / f"triton-{version}"
    if not folder.joinpath("triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", folder, f"triton=={version}"], check=True)
    return folder


def run(command: list[str], **environment: str) -> tuple[bool, str]:
    """Whether it passed, and the last line that it printed, which counts."""
    print("$", " ".join(command), flush=True)
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
    if done.returncode:
        print("\n".join(lines[-20:]))
    return done.returncode == 0, lines[-1]


def row(version: str) -> tuple[bool, str]:
    """Whether everything passed under this version, and its line of the table."""
    folder, cells, good = str(installed(version)), [], True
    for file in TESTS:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", file]
        passed, line = run(command, FASTLORA_COMPILE_TRITON=folder)
        good &= passed
        cells.append(re.sub(r" in .*", "", line.strip("= ")))
    for target in ("sm_80", "sm_90"):
        command = [sys.executable, "-m", "tools.machine", "--quick", "--misses", "--target", target]
        known = KNOWN.get(version, "") if target == "sm_90" else ""
        passed, line = run([*command, "--allow", known], PYTHONPATH=folder)
        good &= passed
        cells.append(line.partition(": ")[2].partition(";")[0] + (f", {known}" if known else ""))
    return good, f"| {version} | {VERSIONS[version]} | {' | '.join(cells)} |"


def write(rows: dict[str, str]) -> None:
    """Put these lines into the page's table, beside those of other versions."""
    head, mark, rest = PAGE.read_text(encoding="utf-8").partition(f"{MARK}\n\n")
    table, gap, tail = rest.partition("\n\n")
    title, ruler, *old = table.splitlines()
    rows = {line.split("|")[1].strip(): line for line in old} | rows
    table = "\n".join([title, ruler, *[rows[version] for version in VERSIONS if version in rows]])
    PAGE.write_text(head + mark + table + gap + tail, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--version", nargs="+", default=[*VERSIONS], metavar="X.Y.Z")
    good = True
    for version in parser.parse_args().version:
        passed, line = row(version)
        good &= passed
        print(line, flush=True)
        write({version: line})
    sys.exit(not good)


if __name__ == "__main__":
    main()
