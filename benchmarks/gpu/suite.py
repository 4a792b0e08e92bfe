"""The tests of the ops and the kernels, in several processes: most of their time is compiling."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile

OPS = (
    "lora_linear", "kernel", "triton_backend", "long_strides", "dropout", "library", "memory",
    "linear_layer", "judge",
)  # fmt: skip
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed)")
_FAILURE = re.compile(r"^(?:FAILED|ERROR) .*$", re.MULTILINE)


def test_files(root: Path, dry: bool) -> list[Path]:
    """What only a GPU can show, then a kernel's (by the names in kernels/), then the ops'.

    When dry, one quick file.
    """
    if dry:
        return [root / "tests" / "test_judge.py"]
    nouns = [
        path.stem for path in sorted((root / "kernels").glob("*.py")) if path.stem != "__init__"
    ]
    found: dict[Path, None] = {}
    for noun in ("gpu", *nouns, *OPS):
        found |= dict.fromkeys(sorted((root / "tests").rglob(f"test_{noun}.py")))
        found |= dict.fromkeys(sorted((root / "tests").rglob(f"test_{noun}_*.py")))
    return [path for path in found if path.name != "test_gpu_visit.py"]


def run_suite(root: Path, seconds: float, dry: bool, environment: dict[str, str]) -> dict:
    """Counts, and the text of the first failures.  At the time's end pytest is interrupted."""
    end = time.monotonic() + seconds
    files = [str(path.relative_to(root)) for path in test_files(root, dry)]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    collected = subprocess.run(
        [*command, "--collect-only", *files],
        cwd=root, env=environment, capture_output=True, text=True, timeout=max(seconds, 30),
    )  # fmt: skip
    tests = [
        line for line in collected.stdout.splitlines() if line.startswith("tests") and "::" in line
    ]
    if not tests:
        raise RuntimeError(f"no tests were collected: {_tail(collected.stdout + collected.stderr)}")
    count = 1 if dry else max(1, min(12, (os.cpu_count() or 2) - 2, len(tests)))
    with ExitStack() as stack:
        logs = [stack.enter_context(TemporaryFile("w+", errors="replace")) for _ in range(count)]
        running = [
            subprocess.Popen(
                [*command, "--maxfail=10", "--tb=short", *tests[i::count]],
                cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True,
            )
            for i, log in enumerate(logs)
        ]  # fmt: skip
        interrupted = _interrupt(running, end)
        outputs = [(log.seek(0), log.read())[1] for log in logs]
    return {
        "table": "gpu-tests",
        "files": files,
        "collected": len(tests),
        "processes": count,
        "interrupted": interrupted,
        **_summary(outputs),
    }


def _interrupt(running: list[subprocess.Popen], end: float) -> int:
    """Wait until ``end``, and for how many that was too short: they sum up what they have."""
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(end - time.monotonic(), 0.1))
    late = [process for process in running if process.poll() is None]
    for process in late:
        process.send_signal(signal.SIGINT)
    last = time.monotonic() + 10
    for process in late:
        try:
            process.wait(timeout=max(last - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return len(late)


def _summary(outputs: list[str]) -> dict:
    counts: dict[str, int] = {}
    failures, texts = [], []
    for output in outputs:
        last = output.rstrip().rsplit("\n", 1)[-1]
        found = _COUNT.findall(last)
        for number, kind in found:
            counts[kind] = counts.get(kind, 0) + int(number)
        failures += _FAILURE.findall(output)
        if failures or not found:
            texts.append(_tail(output))
    return {"counts": counts, "failures": failures[:30], "texts": texts[:3]}


def _tail(text: str) -> str:
    return text[-6000:]
